"""A smaller dense model from one that has lost hidden units or decoder blocks, in whose place are zeros."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from sparsellm_lightning.architecture import DecoderLayout, unwrapped_names
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.sparsity import has_adapters, merged_state

Shapes = dict[str, torch.Size]


def rebuilt(
    model: PreTrainedModel, state_dict: dict[str, Tensor], config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A plain model of the same class with whole weights.

    Args:
        model: may be sharded.
        state_dict: whole.
        config: of the new model. None: the model's.
    """
    whole = _without_weights(model, config or model.config)
    whole.load_state_dict(state_dict, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


def check_shrinkable(layout: DecoderLayout, settings: PruningConfig) -> None:
    """Refuse, before any long work, a model whose configuration could not say what is left of it.

    Raises:
        UserError: no change of the configuration gives the shapes that a smaller model would have.
    """
    if settings.removes_neurons:
        width = layout.networks[0].roles["down"].shape[1]
        keep = torch.arange(width) < settings.kept_units(width)
        _narrower_config(layout, _kept_entries(layout, [keep] * len(layout.networks)), int(keep.sum()))
    elif settings.removes_blocks:
        blocks = len(layout.blocks)
        _shallower_config(layout, range(settings.kept_blocks(blocks)))


def shrink(
    layout: DecoderLayout, settings: PruningConfig, state_dict: dict[str, Tensor] | None = None
) -> PreTrainedModel:
    """A dense model without the hidden units or blocks that are zero. Its outputs are those of the model with the zeros.

    LoRA adapters are merged.

    Args:
        layout: of the model.
        settings: with which it was pruned.
        state_dict: whole weights of a model that is sharded over ranks. None: the model's own.

    Raises:
        UserError: see :func:`check_shrinkable`.
    """
    state_dict = layout.model.state_dict() if state_dict is None else state_dict
    if has_adapters(layout.model):
        state_dict = merged_state(layout.model, state_dict)
    return (_shallower if settings.removes_blocks else _narrower)(layout, settings, state_dict)


def _narrower(layout: DecoderLayout, settings: PruningConfig, state_dict: dict[str, Tensor]) -> PreTrainedModel:
    units = settings.kept_units(layout.networks[0].roles["down"].shape[1])
    names, kept = unwrapped_names(layout.model), []
    for network in layout.networks:
        p = network.roles["down"]
        zero = ~p.of(state_dict[f"{names[p.module]}.{p.parameter_name}"]).any(0)
        # Those that left are zero. A unit that is zero besides may leave as well as they.
        order = zero.to(torch.uint8).argsort(stable=True)
        kept.append(torch.zeros_like(zero).index_fill_(0, order[:units], True))
    entries = _kept_entries(layout, kept)
    smaller = {
        name: tensor.index_select(entries[name][0], entries[name][1].nonzero().flatten().to(tensor.device))
        if name in entries
        else tensor
        for name, tensor in state_dict.items()
    }
    return rebuilt(layout.model, smaller, _narrower_config(layout, entries, units))


def _shallower(layout: DecoderLayout, settings: PruningConfig, state_dict: dict[str, Tensor]) -> PreTrainedModel:
    names = unwrapped_names(layout.model)

    def left(index: int) -> bool:
        tensors = [
            p.of(state_dict[f"{names[p.module]}.{p.parameter_name}"]) for p in layout.blocks[index].projections()
        ]
        return not any(bool(tensor.any()) for tensor in tensors)

    zero = [left(block.index) for block in layout.blocks]
    # Those that left are zero.
    kept = sorted(sorted(range(len(zero)), key=lambda index: zero[index])[: settings.kept_blocks(len(zero))])
    return rebuilt(layout.model, _renumbered(layout, kept, state_dict), _shallower_config(layout, kept))


def _renumbered(layout: DecoderLayout, kept: Sequence[int], by_name: dict[str, Any]) -> dict[str, Any]:
    """The entries that do not belong to blocks that left, with the names that they have in the smaller model."""
    places = {layout.blocks[index].name: layout.blocks[place].name for place, index in enumerate(kept)}
    gone = tuple(f"{block.name}." for block in layout.blocks if block.name not in places)
    found = {}
    for name, value in by_name.items():
        old = next((block for block in places if name.startswith(f"{block}.")), None)
        if old is not None:
            found[places[old] + name.removeprefix(old)] = value
        elif not name.startswith(gone):
            found[name] = value
    return found


def _kept_entries(layout: DecoderLayout, kept: Sequence[Tensor]) -> dict[str, tuple[int, Tensor]]:
    """Of each weight and bias that loses entries: the axis, and a bool for each entry along it.

    Args:
        layout: of the model.
        kept: of each feed-forward network, (f,) bool.
    """
    names = unwrapped_names(layout.model)
    found: dict[str, tuple[int, Tensor]] = {}
    for network, units in zip(layout.networks, kept, strict=True):
        down = network.roles["down"]
        found[f"{names[down.module]}.{down.parameter_name}"] = (0 if down.transposed else 1, units)
        for p in network.first:
            name = f"{names[p.module]}.{p.parameter_name}"
            rows = slice(None) if p.rows is None else slice(*p.rows)
            total = len(units) if p.rows is None else 2 * len(units)  # gate and up in one matrix
            axis, entries = found.get(name, (1 if p.transposed else 0, torch.zeros(total, dtype=torch.bool)))
            entries[rows] = units.cpu()
            found[name] = axis, entries
            found[f"{names[p.module]}.bias"] = 0, entries
    return found


def _narrower_config(layout: DecoderLayout, entries: dict[str, tuple[int, Tensor]], units: int) -> PretrainedConfig:
    """The configuration with fewer hidden units.

    The setting of the width is found by trial: each that has the width as its value, or no value, is changed. The model that
    results must have the expected shapes.
    """
    model, width = layout.model, layout.networks[0].roles["down"].shape[1]
    expected = _shapes(_without_weights(model, model.config))
    for name, (axis, kept) in entries.items():
        if name in expected:
            shape = list(expected[name])
            shape[axis] = int(kept.sum())
            expected[name] = torch.Size(shape)
    settings = model.config.get_text_config(decoder=True).to_dict()
    same = [name for name, value in settings.items() if value == width and type(value) is int]
    lists = [name for name, value in settings.items() if isinstance(value, list) and {*map(str, value)} == {str(width)}]
    unset = [name for name, value in settings.items() if value is None]
    for name in same + lists + unset:
        config = _changed(model.config, {name: [units] * len(settings[name]) if name in lists else units})
        if config is not None and _has_shapes(model, config, expected):
            return config
    raise UserError(
        f"Pattern neurons needs a configuration that says how many hidden units there are, but that of {type(model).__name__} "
        f"has no such setting: {width} is fixed in its code. Use another pattern."
    )


def _shallower_config(layout: DecoderLayout, kept: Sequence[int]) -> PretrainedConfig:
    """The configuration with fewer blocks. Lists with an entry a block lose those of the blocks that left."""
    model, blocks = layout.model, len(layout.blocks)
    settings = model.config.get_text_config(decoder=True).to_dict()
    changes: dict[str, Any] = {
        name: [value[index] for index in kept]
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == blocks and not name.endswith(("_id", "_ids"))
    }
    config = _changed(model.config, {**changes, "num_hidden_layers": len(kept)})
    expected = _renumbered(layout, kept, _shapes(_without_weights(model, model.config)))
    if config is None or not _has_shapes(model, config, expected) or not _alike(layout, kept, config):
        raise UserError(
            f"Pattern blocks needs a configuration that says which blocks there are, but that of {type(model).__name__} cannot "
            f"say that {len(kept)} of {blocks} are left. Use another pattern."
        )
    return config


def _alike(layout: DecoderLayout, kept: Sequence[int], config: PretrainedConfig) -> bool:
    """Whether the blocks that a configuration gives have the settings of those that are kept, such as attention windows."""
    old = _without_weights(layout.model, layout.model.config)
    new = _without_weights(layout.model, config)
    return all(
        list(_settings(old.get_submodule(layout.blocks[index].name)))
        == list(_settings(new.get_submodule(layout.blocks[place].name)))
        for place, index in enumerate(kept)
    )


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        yield name, type(child)
        for key, value in vars(child).items():
            if isinstance(value, (int, float, str, bool, type(None))) and "idx" not in key and "index" not in key:
                yield key, value


def _changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig | None:
    """A copy with other settings of the text decoder. None if the configuration refuses them."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config(decoder=True)
    try:
        for name, value in changes.items():
            setattr(text, name, value)
    except (ValueError, TypeError, AttributeError):
        return None
    return changed


def _has_shapes(model: PreTrainedModel, config: PretrainedConfig, expected: Shapes) -> bool:
    try:
        return _shapes(_without_weights(model, config)) == expected
    except Exception:  # a setting that this value does not suit
        return False


def _shapes(model: PreTrainedModel) -> Shapes:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _without_weights(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device."""
    # FSDP2 changes the class of a sharded module to one that derives from the model's.
    plain: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    with torch.device("meta"):
        found: PreTrainedModel = plain(config)
    return found
