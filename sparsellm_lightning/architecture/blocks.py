"""Finding a model in a module, and a model's decoder blocks, from its modules alone."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.architecture.table import ARCHITECTURES
from sparsellm_lightning.errors import UserError

# Name parts that torch.compile, activation checkpointing, FSDP1 and LoRA insert.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)(\.|$)")


def unwrapped(name: str) -> str:
    """A dotted name without the parts that wrappers insert."""
    return _WRAPPERS.sub("", name).rstrip(".")


def unwrapped_names(module: nn.Module) -> dict[nn.Module, str]:
    """Every module inside by its dotted name, without the parts that wrappers insert."""
    return {child: unwrapped(name) for name, child in module.named_modules()}


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder blocks, in order: the list of modules that ``register_architecture`` named, or that is found.

    Lists of modules are looked for in the text decoder, outside other models (image and audio towers) and outside each other.
    Lists whose length is the configuration's number of layers are preferred. Of these, or of all lists if there are none, the
    one with most weights in linear layers and experts is taken.

    Raises:
        UserError: there is no such list.
    """
    row = ARCHITECTURES.get(model.config.model_type)
    if row is not None and row.blocks is not None:
        try:
            found: Any = model.base_model.get_submodule(row.blocks)
            return list(found.values() if isinstance(found, nn.ModuleDict) else found)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"The row for {model.config.model_type!r} must name a list of blocks of {type(model.base_model).__name__}, got "
                f"{row.blocks!r} ({error}). Correct the row with register_architecture."
            ) from None
    text = model.config.get_text_config(decoder=True)
    lists = [found for found in _outer_lists(model, model, text) if _weights(found)]
    layers = getattr(text, "num_hidden_layers", None)
    chosen = [found for found in lists if len(found) == layers] or lists
    if not chosen:
        raise UserError(
            f"Pruning needs a list of decoder blocks, but {type(model).__name__} holds no list of modules with linear layers. "
            "Name it with register_architecture(model_type, Architecture(blocks='path.from.base_model'))."
        )
    return list(max(chosen, key=_weights))


def _outer_lists(module: nn.Module, model: PreTrainedModel, text: object) -> Iterator[nn.ModuleList]:
    """Outermost module lists, without those of other models inside, which have configurations of their own."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        elif not isinstance(child, PreTrainedModel) or type(child.config) in (type(model.config), type(text)):
            yield from _outer_lists(child, model, text)


def _weights(blocks: Any) -> int:
    """Number of weights in linear layers and in parameters of three dimensions."""
    # By the layers' attributes, because the parameter of a sharded module may be a flat piece, and empty on this rank.
    linear = {id(m.weight): m.in_features * m.out_features for m in blocks.modules() if isinstance(m, nn.Linear)}
    linear |= {id(m.weight): m.nx * m.nf for m in blocks.modules() if isinstance(m, Conv1D)}
    return sum((linear | {id(p): p.numel() for p in blocks.parameters() if p.dim() == 3}).values())


@contextmanager
def refusing(rule: str, end: str = "") -> Iterator[None]:
    """Turn an error inside this context into a UserError: the rule that is broken, the error, and ``end``.

    Refusals and errors of memory pass.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{rule}: {type(error).__name__}: {error}{end}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode. Compiled modules run eagerly, because hooks inside a compiled block never fire.

    Mixtures give no router logits: the loss that is computed from them fails if blocks do not run. Training modes and
    configurations are restored at the end.
    """
    modes = {module: module.training for module in model.modules()}
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    routed = [config for config in configs if getattr(config, "output_router_logits", False)]
    model.eval()
    try:
        for config in routed:
            config.output_router_logits = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for config in routed:
            config.output_router_logits = True


@contextmanager
def patched(owner: object, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one object inside this context."""
    own = vars(owner).get(name)
    vars(owner)[name] = method
    try:
        yield
    finally:
        del vars(owner)[name]
        if own is not None:
            vars(owner)[name] = own


def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Replace a module's forward inside this context. Hooks of the module still run around it."""
    return patched(module, "forward", forward)


def hidden_states(returned: Any) -> Tensor:
    """The hidden states in what a decoder block returned: alone, or the first of several values."""
    first: Tensor = returned[0] if isinstance(returned, (tuple, list)) else returned
    return first


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    return next(module.parameters()).device


def context_of(model: PreTrainedModel) -> float:
    """Most tokens of a window: those that the model has positions for. Infinity, if nothing limits them."""
    config = model.config.get_text_config()
    settings = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    given = [found for name in settings if (found := getattr(config, name, None)) is not None]
    if not given or given[0] <= 0:  # XLNet has -1
        return math.inf
    # RoBERTa and its kin number positions from behind the padding index.
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    skipped = max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
    limit: int = given[0] - skipped
    return limit


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of tokens that the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    found: int | None = getattr(embeddings, "num_embeddings", None)
    return model.config.get_text_config().vocab_size if found is None else found


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a forward from storing keys and values, if the forward has it."""
    known = inspect.signature(model.forward).parameters.values()
    return {"use_cache": False} if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in known) else {}


def token_input(inputs: Mapping[str, Tensor]) -> Tensor:
    """The model argument with one row per window and one column per token: token ids or their embeddings."""
    return next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs)


def find_model(module: nn.Module, attribute: str | None = None) -> PreTrainedModel:
    """The ``transformers`` model that a LightningModule holds, found by type.

    Args:
        module: the LightningModule (or a model itself).
        attribute: dotted attribute that holds the model. Needed if the module holds several models.

    Raises:
        UserError: no model, or several and no ``attribute``.
    """
    candidates = _candidates(module)
    names = ", ".join(candidates) or "none"
    if attribute is not None:
        try:
            found = module.get_submodule(attribute)
        except AttributeError:
            found = None
        if not isinstance(found, PreTrainedModel):
            raise UserError(
                f"model_attribute must name a transformers PreTrainedModel, but {type(module).__name__}.{attribute} is "
                f"{'missing' if found is None else type(found).__name__}. Candidates: {names}."
            )
        return found
    if len(candidates) != 1:
        fix = "Name it with model_attribute." if candidates else "Assign one to an attribute, or in configure_model()."
        raise UserError(
            f"{type(module).__name__} must hold exactly one transformers PreTrainedModel to prune, found {names}. {fix}"
        )
    return next(iter(candidates.values()))


def _candidates(module: nn.Module) -> dict[str, PreTrainedModel]:
    """Outermost models by name. A causal LM's own base model is not another candidate."""
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if isinstance(child, PreTrainedModel) and not inside:
            found[name] = child
    return found
