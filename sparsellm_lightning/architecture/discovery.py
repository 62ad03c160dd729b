"""Finding a model in a module, and a model's blocks and projections."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from posixpath import commonpath, dirname
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsellm_lightning.architecture.layout import Block, DecoderLayout, Projection
from sparsellm_lightning.architecture.table import find_architecture
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import find_activation

# Name parts that torch.compile, activation checkpointing, FSDP1 and LoRA insert.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)(\.|$)")


def describe(model: PreTrainedModel, config: PruningConfig | None = None) -> DecoderLayout:
    """Find a model's blocks and projections, and check that the settings can be applied to them.

    Args:
        model: a ``transformers`` model whose type is in the table.
        config: settings. None: the default settings, under which every projection is pruned.

    Raises:
        UserError: an unknown architecture, a block that is listed twice, an ``ignore`` pattern that matches nothing, columns
            that do not divide by the N:M group, or block indices outside the model.
    """
    config = config or PruningConfig()
    row, model_type = find_architecture(model.config.model_type), model.config.model_type
    names = unwrapped_names(model)
    unmatched = set(config.ignore)

    def projection(block: nn.Module, path: str) -> Projection:
        module = _get(block, path, model_type)
        module = getattr(module, "base_layer", module)  # under a LoRA adapter
        name = names[module]
        matching = {
            pattern for pattern in config.ignore if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        }
        unmatched.difference_update(matching)
        return Projection(name, module, pruned=not matching)

    blocks = []
    modules = decoder_blocks(model)
    if len(set(modules)) < len(modules):
        raise UserError(
            f"Every decoder block must be a module of its own, but {len(modules)} blocks of {type(model).__name__} are only "
            f"{len(set(modules))} modules. A shared block cannot be solved for two places: copy it first."
        )
    for index, module in enumerate(modules):
        attention = [[projection(module, path) for path in group] for group in row.attention]
        paths = {"gate": row.gate, "up": row.up, "down": row.down}
        feed_forward = {role: projection(module, path) for role, path in paths.items() if path is not None}
        holder = commonpath([dirname("/" + path.replace(".", "/")) for group in row.attention for path in group])[1:]
        attention_module = module.get_submodule(holder.replace("/", ".")) if holder else None
        blocks.append(Block(index, names[module], module, attention, feed_forward, attention_module))
    if unmatched:
        raise UserError(
            f"Every ignore pattern must match a projection, but {sorted(unmatched)} match none. The first block's "
            f"projections are {', '.join(p.name for p in blocks[0].projections())}; embeddings, norms and the head are never "
            "pruned. Correct the patterns."
        )
    activation = find_activation(getattr(model.config, row.activation))
    layout = DecoderLayout(model, blocks, activation, row.additive(model.config))
    _check_groups(layout, config)
    config.alternates_in(len(blocks))
    return layout


def unwrapped_names(module: nn.Module) -> dict[nn.Module, str]:
    """Every module inside by its dotted name, without the parts that wrappers insert."""
    return {child: _WRAPPERS.sub("", name).rstrip(".") for name, child in module.named_modules()}


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder blocks, in order.

    Raises:
        UserError: an unknown architecture.
    """
    model_type = model.config.model_type
    return list(_get(model.base_model, find_architecture(model_type).blocks, model_type))


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter."""
    return next(module.parameters()).device


def find_model(module: nn.Module, attribute: str | None = None) -> PreTrainedModel:
    """The ``transformers`` model that a LightningModule holds, found by type.

    Args:
        module: the LightningModule (or a model itself).
        attribute: dotted attribute that holds the model. Needed if the module holds several models.

    Raises:
        UserError: no model, or several and no ``attribute``.
    """
    if attribute is not None:
        try:
            found = module.get_submodule(attribute)
        except AttributeError:
            found = None
        if not isinstance(found, PreTrainedModel):
            raise UserError(
                f"model_attribute must name a transformers PreTrainedModel, but {type(module).__name__}.{attribute} is "
                f"{'missing' if found is None else type(found).__name__}. Candidates: {_candidates(module) or 'none'}."
            )
        return found
    candidates = _candidates(module)
    if len(candidates) != 1:
        found_names = ", ".join(candidates) if candidates else "none"
        fix = "Name it with model_attribute." if candidates else "Assign one to an attribute, or in configure_model()."
        raise UserError(
            f"{type(module).__name__} must hold exactly one transformers PreTrainedModel to prune, found {found_names}. {fix}"
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


def _check_groups(layout: DecoderLayout, config: PruningConfig) -> None:
    wrong = [f"{p.name} ({p.shape[1]})" for p in layout.projections() if p.pruned and p.shape[1] % config.group]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"Pattern {config.pattern} needs input features that divide by {config.group}, not so in "
            f"{', '.join(wrong[:4])}{more}. Choose another pattern, or leave these dense with ignore."
        )


def _get(module: nn.Module, path: str, model_type: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UserError(
            f"The table's row for {model_type!r} names {path!r}, which {type(module).__name__} does not have ({error}). "
            "Correct the row with register_architecture."
        ) from None
