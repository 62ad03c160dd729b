"""A smaller dense model from one whose feed-forward networks have lost hidden units."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from sparsellm_lightning.architecture import DecoderLayout, unwrapped_names
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.sparsity import has_adapters, merged_state


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


def shrunk_config(layout: DecoderLayout, units: int) -> PretrainedConfig:
    """The model's configuration with fewer hidden units.

    The setting of the width is found by trial: each that has the width as its value, or no value, is changed. The model that
    results must have the expected shapes.

    Args:
        layout: of the model.
        units: that are left in every feed-forward network.

    Raises:
        UserError: no setting gives these shapes.
    """
    model = layout.model
    width = layout.networks[0].roles["down"].shape[1]
    keep = torch.arange(width) < units
    expected = {name: tensor.shape for name, tensor in _without_weights(model, model.config).state_dict().items()}
    for name, (axis, entries) in _kept_entries(layout, [keep] * len(layout.networks)).items():
        if name in expected:
            shape = list(expected[name])
            shape[axis] = int(entries.sum())
            expected[name] = torch.Size(shape)
    for config in _changed_configs(model.config, width, units):
        try:
            found = {name: tensor.shape for name, tensor in _without_weights(model, config).state_dict().items()}
        except Exception:  # a setting that this value does not suit
            continue
        if found == expected:
            return config
    raise UserError(
        f"Pattern neurons needs a configuration that says how many hidden units there are, but that of {type(model).__name__} "
        f"has no such setting: {width} is fixed in its code. Use another pattern."
    )


def shrink(layout: DecoderLayout, units: int, state_dict: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """A dense model without the hidden units that are zero. Its outputs are those of the model with the zeros.

    LoRA adapters are merged.

    Args:
        layout: of the model.
        units: that are left in every feed-forward network.
        state_dict: whole weights of a model that is sharded over ranks. None: the model's own.

    Raises:
        UserError: see :func:`shrunk_config`.
    """
    state_dict = layout.model.state_dict() if state_dict is None else state_dict
    if has_adapters(layout.model):
        state_dict = merged_state(layout.model, state_dict)
    names = unwrapped_names(layout.model)
    kept = []
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
    return rebuilt(layout.model, smaller, shrunk_config(layout, units))


def _kept_entries(layout: DecoderLayout, kept: list[Tensor]) -> dict[str, tuple[int, Tensor]]:
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


def _changed_configs(config: PretrainedConfig, width: int, units: int) -> Iterator[PretrainedConfig]:
    """Copies of a configuration, in each of which one setting says ``units`` instead of the width, or of nothing."""
    settings = config.get_text_config(decoder=True).to_dict()
    same = [name for name, value in settings.items() if value == width and type(value) is int]
    lists = [name for name, value in settings.items() if isinstance(value, list) and {*map(str, value)} == {str(width)}]
    unset = [name for name, value in settings.items() if value is None]
    for name in same + lists + unset:
        changed = copy.deepcopy(config)
        value: Any = [units] * len(settings[name]) if name in lists else units
        try:
            setattr(changed.get_text_config(decoder=True), name, value)
        except (ValueError, TypeError, AttributeError):
            continue
        yield changed


def _without_weights(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device."""
    # FSDP2 changes the class of a sharded module to one that derives from the model's.
    plain: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    with torch.device("meta"):
        found: PreTrainedModel = plain(config)
    return found
