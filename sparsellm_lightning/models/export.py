"""Writing a pruned model as a Hugging Face folder: refused at the start or written whole at the end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.architecture import unwrapped
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.loading import note_untied
from sparsellm_lightning.models.packed import pack_folder
from sparsellm_lightning.models.smaller import rebuilt, without_weights
from sparsellm_lightning.sparsity import has_adapters, merged_state

log = logging.getLogger(__name__)

REPORT_NAME = "pruning_report.json"


def check_export_dir(export_dir: str | Path, overwrite: bool) -> None:
    """Refuse, before any long work, a folder that could not be written at the end. A trial folder is written beside it.

    Raises:
        UserError: the path is not a plain folder, holds the working directory, is not empty and ``overwrite`` is false, holds
            files that no export wrote, or cannot be written.
    """
    path = Path(export_dir)
    if path.is_symlink() or (path.exists() and not path.is_dir()) or os.path.ismount(path):
        kind = "symbolic link" if path.is_symlink() else "mount point" if path.is_dir() else "file"
        raise UserError(f"export_dir must be a plain folder, got the {kind} {export_dir}. Choose another name.")
    here = Path.cwd().resolve()
    if path.resolve() in (here, *here.parents):
        raise UserError(
            f"export_dir must not be the working directory or a folder above it, got {export_dir}. Name a folder of its own."
        )
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if names and not overwrite:
        raise UserError(
            f"export_dir must be empty, but {export_dir} holds {len(names)} entries. "
            "Choose another folder, or set overwrite to true (its contents are then replaced)."
        )
    foreign = sorted(names - _exported(path))
    if foreign:
        raise UserError(
            f"overwrite replaces an earlier export, but {export_dir} holds files that no export wrote, such as {foreign[0]}. "
            "Choose another folder, or move these files."
        )
    try:
        with _beside(path, "trial") as trial:
            (trial / REPORT_NAME).write_bytes(b"0")
            shutil.rmtree(trial)
    except OSError as error:
        raise UserError(
            f"export_dir must be writable, but {export_dir} is not: {error.strerror or error}. Choose another folder."
        ) from error


def check_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Refuse configurations and a tokenizer that transformers would fail to save, after the run, in ``folder``.

    Raises:
        UserError: a configuration or tokenizer that ``save_pretrained`` refuses.
    """
    generation = getattr(model, "generation_config", None) if model.can_generate() else None
    for name, companion in (("config", model.config), ("generation_config", generation), ("tokenizer", tokenizer)):
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent) as trial:
                if companion is not None:
                    companion.save_pretrained(trial)
        except OSError:  # of the disk
            raise
        except Exception as error:  # of any class: JSON refuses some values, transformers others
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{name} must be valid to be exported: {cause}. Correct it before the run.") from error


def check_rebuildable(model: PreTrainedModel) -> None:
    """Refuse a model that an export must build anew, because it is sharded, wrapped, adapted or made smaller, but cannot.

    Raises:
        UserError: the class cannot be made from the configuration alone, or makes other parameters.
    """
    what = f"An export of a smaller, sharded, compiled or adapted model builds it anew, but {type(model).__name__}"
    try:
        plain = without_weights(model, model.config)
    except Exception as error:
        raise UserError(
            f"{what} cannot be made from its configuration alone: {error}. Give its class an __init__ that needs no more."
        ) from error
    found = {unwrapped(name) for name, _ in model.named_parameters()}
    if has_adapters(model) or any("_flat_param" in name for name in found):  # other names stand for the same weights
        return
    added = sorted(found ^ {name for name, _ in plain.named_parameters()})
    if added:
        raise UserError(
            f"{what} made from its configuration has other parameters, such as {added[0]}. Remove what was added to the model, "
            "or make it in the class."
        )


def export_model(
    model: PreTrainedModel,
    export_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    state_dict: dict[str, Tensor] | None = None,
    report: Callable[[], Mapping[str, Any]] | None = None,
    more: Callable[[Path], object] | None = None,
    pack: bool = False,
) -> Path:
    """Write config, safetensors and tokenizer, for ``AutoModelForCausalLM.from_pretrained``, and ``pruning_report.json``.

    LoRA adapters are merged, with the zeros kept. The folder is written beside the target and renamed into place, so that a
    folder that exists is complete. An export that is replaced is deleted after the new one is in place.

    Args:
        model: to write.
        export_dir: target folder.
        tokenizer: written into the folder. None: no tokenizer.
        overwrite: replace an earlier export.
        state_dict: whole weights of a model that is sharded over ranks. None: the model's own.
        report: returns the content of ``pruning_report.json``, called after all other files are written. Their names are
            added as ``"files"``. None: the names only.
        more: writes further files into a folder, such as plots.
        pack: leave the zeros out, see :mod:`~sparsellm_lightning.models.packed`. Then :func:`~sparsellm_lightning.load_model`
            reads the folder, but plain ``transformers`` does not. The report gets ``"files_bytes"``.

    Raises:
        UserError: see :func:`check_export_dir`.
        ValueError: the report holds NaN or infinity.
    """
    target = Path(export_dir).expanduser()
    check_export_dir(target, overwrite)
    if state_dict is None:
        note_untied(model)
    if has_adapters(model):
        state_dict = merged_state(model, model.state_dict() if state_dict is None else state_dict)
    elif state_dict is None and any(unwrapped(name) != name for name, _ in model.named_parameters()):
        state_dict = model.state_dict()
    if state_dict is not None:
        model = rebuilt(model, state_dict)
    with _beside(target, "partial") as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _copy_what_belongs(model.config.name_or_path or "", partial)
        if more is not None:
            more(partial)
        sizes = {"files_bytes": pack_folder(partial)} if pack else {}
        files = sorted({REPORT_NAME, *(entry.name for entry in partial.iterdir())})
        content = json.dumps({**(report() if report else {}), **sizes, "files": files}, indent=2, allow_nan=False)
        (partial / REPORT_NAME).write_text(content + "\n", encoding="utf-8")
        _put_in_place(partial, target)
    return target


_BELONGING = ("LICENSE*", "NOTICE*", "USE_POLICY*", "*processor_config.json")


def _copy_what_belongs(source: str, folder: Path) -> None:
    """Copy licences, and settings of what turns images and audio into inputs, from the folder of the dense model."""
    if not source or not Path(source).expanduser().is_dir():
        return
    for file in chain.from_iterable(Path(source).expanduser().glob(pattern) for pattern in _BELONGING):
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def replace_text(path: Path, content: str) -> None:
    """Write a file beside its place, then rename it, so that a full disk leaves the earlier one and nothing else."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        new.write_text(content, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def add_to_report(folder: str | Path, **entries: Any) -> None:
    """Add entries to an export's report. Nothing happens if the folder is no export; one that is read-only gives a warning."""
    path = Path(folder).expanduser() / REPORT_NAME
    if not path.is_file():
        return
    try:
        content = json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries, indent=2, allow_nan=False)
        replace_text(path, content + "\n")
    except (OSError, ValueError) as error:
        warnings.warn(f"{', '.join(entries)} could not be added to {path}: {error}", stacklevel=2)


def export_or_rescue(export: Callable[..., object], export_dir: Path, overwrite: bool) -> None:
    """Export, or if that fails write the model to another folder, if need be without its report and companions.

    Args:
        export: :func:`export_model` without its folder.
        export_dir, overwrite: its arguments.

    Raises:
        UserError: the export failed. Names the folder that holds the model.
    """
    try:
        export(export_dir=export_dir, overwrite=overwrite)
    except Exception as error:  # of any class: safetensors has its own for a full disk, and the model must not be lost
        parents = (export_dir.parent, Path.cwd(), Path(tempfile.gettempdir()))
        plain: dict[str, Any] = {"report": None, "more": None}
        for parent, less in product(parents, ({}, plain, {**plain, "tokenizer": None})):
            rescue = parent / f"{export_dir.name}-rescued-{uuid.uuid4().hex[:8]}"
            try:
                export(export_dir=rescue, **less)
            except Exception:
                log.debug("The export to %s failed too.", rescue, exc_info=True)
                continue
            raise UserError(
                f"export_dir {export_dir} could not be written ({error}). The model is in {rescue}."
            ) from error
        raise


def _exported(folder: Path) -> set[str]:
    """Names of the files that an earlier export wrote into a folder."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        return {str(name) for name in report["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def _beside(target: Path, purpose: str) -> Iterator[Path]:
    """A new folder beside the target, deleted at the end if it is still there."""
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{purpose}")
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover_export(target: Path) -> None:
    """Put an earlier export back whose place was empty when the run that replaced it was killed."""
    if not target.exists():
        for earlier in target.parent.glob(f".{target.name}.*.old/{target.name}"):
            earlier.rename(target)
            earlier.parent.rmdir()
            return


def _put_in_place(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    with _beside(target, "old") as old:
        target.rename(old / target.name)
        try:
            folder.rename(target)
        except BaseException:
            (old / target.name).rename(target)
            raise
