"""A smaller dense model from one that has lost hidden units, heads or decoder blocks, in whose place are zeros."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from sparsellm_lightning.architecture import Attention, DecoderLayout, Projection, unwrapped, unwrapped_names
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.loading import note_untied
from sparsellm_lightning.sparsity import has_adapters, merged_state

Shapes = dict[str, torch.Size]

Cut = dict[str, tuple[int, Tensor]]
"""Name of each parameter that loses entries -> (axis, bool for each entry along that axis, True = kept)."""


@dataclass(frozen=True)
class Shrinkage:
    """What is removed from a model.

    Args:
        units: number of hidden units that every feed-forward network keeps. None: all.
        heads: number of heads that every attention keeps: key-value heads, or query heads if all share one. None: all.
        blocks: indices of the blocks that are removed.
    """

    units: int | None = None
    heads: int | None = None
    blocks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Smaller:
    """A model without what was removed.

    Args:
        model: on its own, with whole weights.
        names: by name of each projection that is left, its name in the smaller model.
        shapes: by the same names, its shape there.
        blocks: indices of the blocks that are left, in order.
    """

    model: PreTrainedModel
    names: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    blocks: list[int]


def rebuilt(
    model: PreTrainedModel, state_dict: dict[str, Tensor], config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A plain model of the same class with whole weights.

    Args:
        model: may be sharded.
        state_dict: whole. Names may have parts that wrappers such as ``torch.compile`` insert.
        config: of the new model. None: the model's.
    """
    whole = without_weights(model, config or model.config)
    whole.load_state_dict({unwrapped(name): tensor for name, tensor in state_dict.items()}, assign=True)
    note_untied(whole)  # the weights of a sharded model could not be compared before
    whole.tie_weights()
    if hasattr(model, "generation_config"):  # not where the class cannot generate, such as classifiers
        whole.generation_config = model.generation_config
    return whole


def fixed_shrinkage(layout: DecoderLayout, settings: PruningConfig) -> Shrinkage:
    """What the settings' shares remove. Which blocks are removed is not known before a run: the last ones stand for them."""
    blocks = len(layout.blocks)
    return Shrinkage(
        settings.kept("neurons", layout.units) if "neurons" in settings.removed_shares else None,
        settings.kept("heads", layout.heads) if "heads" in settings.removed_shares else None,
        frozenset(range(settings.kept("blocks", blocks), blocks)),
    )


def check_shrinkable(layout: DecoderLayout, shrinkage: Shrinkage) -> None:
    """Refuse, before any long work, a model whose configuration could not say what is left of it.

    Raises:
        UserError: no change of the configuration gives the shapes that a smaller model would have.
    """
    units = [_first(network.roles["down"].shape[1], shrinkage.units) for network in layout.networks]
    heads = [_first(attention.removable, shrinkage.heads) for attention in _attentions(layout)]
    left = [block.index for block in layout.blocks if block.index not in shrinkage.blocks]
    _smaller_config(layout, shrinkage, _cut_units(layout, units), _cut_heads(layout, heads), left)


def shrink(layout: DecoderLayout, settings: PruningConfig, state_dict: dict[str, Tensor] | None = None) -> Smaller:
    """A dense model without what the settings' pattern removes. Its outputs are those of the model with zeros in its place.

    LoRA adapters are merged.

    Args:
        layout: of the model. Its zeros say what is removed.
        settings: with which it was pruned.
        state_dict: whole weights of a model that is sharded over ranks. None: the model's own.

    Raises:
        UserError: see :func:`check_shrinkable`.
    """
    state_dict = layout.model.state_dict() if state_dict is None else state_dict
    if has_adapters(layout.model):
        state_dict = merged_state(layout.model, state_dict)
    state_dict = {unwrapped(name): tensor for name, tensor in state_dict.items()}
    names = unwrapped_names(layout.model)

    def matrix(p: Projection) -> Tensor:
        return p.of(state_dict[f"{names[p.module]}.{p.parameter_name}"])

    empty = [not any(bool(matrix(p).any()) for p in block.projections()) for block in layout.blocks]
    left = [b.index for b in layout.blocks if not ("blocks" in settings.removes and empty[b.index])]
    units = [matrix(network.roles["down"]).any(0) for network in layout.networks]
    heads = [matrix(a.output).any(0).view(a.removable, -1).any(1) for a in _attentions(layout)]
    number = _most(units) if "neurons" in settings.removes else layout.units
    # Rounded up, so that a unit of zeros may stay.
    number = -(-number // settings.round_to) * settings.round_to
    most = _most(heads) if "heads" in settings.removes else layout.heads
    shrinkage = Shrinkage(  # where sizes differ, none is removed
        number if number < layout.units else None,
        most if most < layout.heads else None,
        frozenset(b.index for b in layout.blocks) - {*left},
    )
    of_units = _cut_units(layout, [_chosen(kept, shrinkage.units) for kept in units])
    of_heads = _cut_heads(layout, [_chosen(kept, shrinkage.heads) for kept in heads])
    config, cut = _smaller_config(layout, shrinkage, of_units, of_heads, left), of_units | of_heads
    smaller = {
        name: tensor.index_select(cut[name][0], cut[name][1].nonzero().flatten().to(tensor.device))
        if name in cut
        else tensor
        for name, tensor in state_dict.items()
    }
    model = rebuilt(layout.model, _renumbered(layout, left, smaller), config)
    blocks = [layout.blocks[index] for index in left]
    places = {
        p.name: (layout.blocks[place], block, p) for place, block in enumerate(blocks) for p in block.projections()
    }
    return Smaller(
        model,
        {name: place.name + name.removeprefix(block.name) for name, (place, block, _) in places.items()},
        {name: _shape(p, cut.get(f"{names[p.module]}.{p.parameter_name}")) for name, (_, _, p) in places.items()},
        left,
    )


def _attentions(layout: DecoderLayout) -> list[Attention]:
    return [block.attention for block in layout.blocks if block.attention is not None]


def _most(kept: Sequence[Tensor]) -> int:
    """The largest number of entries that any of these keeps."""
    return max((int(mask.sum()) for mask in kept), default=0)


def _chosen(kept: Tensor, number: int | None) -> Tensor:
    """``number`` entries, (n,) bool: those that are kept, and then the first of the others. None: all entries."""
    order = (~kept).to(torch.uint8).argsort(stable=True)
    return torch.zeros_like(kept).index_fill_(0, order[: len(kept) if number is None else number], True)


def _first(size: int, number: int | None) -> Tensor:
    return torch.arange(size) < (size if number is None else number)


def _shape(p: Projection, cut: tuple[int, Tensor] | None) -> tuple[int, int]:
    """The shape that a projection has in the smaller model."""
    if cut is None:
        return p.shape
    axis, kept = cut
    rows = (axis == 0) != p.transposed
    number = int((kept[slice(*p.rows)] if rows and p.rows is not None else kept).sum())
    return (number, p.shape[1]) if rows else (p.shape[0], number)


def _renumbered(layout: DecoderLayout, kept: Sequence[int], by_name: dict[str, Any]) -> dict[str, Any]:
    """The entries that do not belong to removed blocks, with the names that they have in the smaller model."""
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


def _cut_units(layout: DecoderLayout, kept: Sequence[Tensor]) -> Cut:
    """The entries that weights and biases keep, given the kept hidden units of each feed-forward network, (f,) bool."""
    names, found = unwrapped_names(layout.model), Cut()
    for network, units in zip(layout.networks, kept, strict=True):
        if not units.all():
            _keep_columns(found, names, network.roles["down"], units)
            for p in network.first:
                _keep_rows(found, names, p, units)
    return found


def _cut_heads(layout: DecoderLayout, kept: Sequence[Tensor]) -> Cut:
    """The entries that weights and biases keep, given the kept heads of each attention, (removable,) bool."""
    names, found = unwrapped_names(layout.model), Cut()
    for attention, heads in zip(_attentions(layout), kept, strict=True):
        if not heads.all():
            _keep_columns(found, names, attention.output, attention.columns(heads))
            by_name = {p.name: p for p in attention.projections}
            for name, rows in attention.rows(heads).items():
                _keep_rows(found, names, by_name[name], rows)
    return found


def _keep_columns(cut: Cut, names: dict[nn.Module, str], p: Projection, kept: Tensor) -> None:
    cut[f"{names[p.module]}.{p.parameter_name}"] = (int(not p.transposed), kept.cpu())


def _keep_rows(cut: Cut, names: dict[nn.Module, str], p: Projection, kept: Tensor) -> None:
    name = f"{names[p.module]}.{p.parameter_name}"
    total = len(kept) if p.rows is None else 2 * len(kept)  # gate and up in one matrix
    axis, entries = cut.get(name, (int(p.transposed), torch.zeros(total, dtype=torch.bool)))
    entries[slice(None) if p.rows is None else slice(*p.rows)] = kept.cpu()
    cut[name] = axis, entries
    cut[f"{names[p.module]}.{p.bias_name}"] = 0, entries


def _smaller_config(
    layout: DecoderLayout, shrinkage: Shrinkage, of_units: Cut, of_heads: Cut, left: Sequence[int]
) -> PretrainedConfig:
    """The configuration of the smaller model, found by trial: a model that is made from it must have the expected shapes."""
    config = layout.model.config
    shapes = _shapes(without_weights(layout.model, config))
    if shrinkage.units is not None:
        shapes = _resized(shapes, of_units)
        config = _narrower_config(layout, config, shapes, shrinkage.units)
    if shrinkage.heads is not None:
        shapes = _resized(shapes, of_heads)
        config = _config_with_heads(layout, config, shapes, shrinkage.heads)
    if shrinkage.blocks:
        config = _shallower_config(layout, config, _renumbered(layout, left, shapes), left)
    return config


def _resized(shapes: Shapes, cut: Cut) -> Shapes:
    def resized(shape: torch.Size, axis: int, kept: Tensor) -> torch.Size:
        return torch.Size([*shape[:axis], int(kept.sum()), *shape[axis + 1 :]])

    return {name: resized(shape, *cut[name]) if name in cut else shape for name, shape in shapes.items()}


def _narrower_config(layout: DecoderLayout, config: PretrainedConfig, expected: Shapes, units: int) -> PretrainedConfig:
    """The configuration with fewer hidden units. Each setting that has their number as its value, or no value, is tried."""
    width = layout.networks[0].roles["down"].shape[1]
    settings = config.get_text_config(decoder=True).to_dict()
    same = [name for name, value in settings.items() if value == width and type(value) is int]
    lists = [name for name, value in settings.items() if isinstance(value, list) and {*map(str, value)} == {str(width)}]
    unset = [name for name, value in settings.items() if value is None]
    changes = ({name: [units] * len(settings[name]) if name in lists else units} for name in same + lists + unset)
    found = _fitting(layout.model, config, expected, changes)
    if found is None:
        raise UserError(
            f"Pattern neurons needs a configuration that says how many hidden units there are, but that of "
            f"{type(layout.model).__name__} has no such setting: {width} is fixed in its code. Use another pattern."
        )
    return found


def _config_with_heads(
    layout: DecoderLayout, config: PretrainedConfig, expected: Shapes, kept: int
) -> PretrainedConfig:
    """The configuration with fewer heads of the same size."""
    attention = _attentions(layout)[0]
    settings = config.get_text_config(decoder=True).to_dict()
    heads = attention.heads * kept // attention.removable
    changes = {"num_attention_heads": heads}
    if "num_key_value_heads" in settings:
        changes["num_key_value_heads"] = kept if attention.groups > 1 else 1
    found = _fitting(layout.model, config, expected, (changes, {**changes, "head_dim": attention.head_size}))
    if found is None:
        raise UserError(
            f"Pattern heads needs a configuration that can say that {heads} of {attention.heads} heads of "
            f"{attention.head_size} features are left, but that of {type(layout.model).__name__} cannot. Choose another "
            "share of heads, or another pattern."
        )
    return found


def _shallower_config(
    layout: DecoderLayout, config: PretrainedConfig, expected: Shapes, kept: Sequence[int]
) -> PretrainedConfig:
    """The configuration with fewer blocks.

    Lists with an entry a block lose those of the removed blocks. Lists of indices of blocks get new ones, if they have to.
    """
    blocks = len(layout.blocks)
    settings = config.get_text_config(decoder=True).to_dict()
    lists = {n: v for n, v in settings.items() if isinstance(v, list) and v and not n.endswith(("_id", "_ids"))}
    number: dict[str, Any] = {"num_hidden_layers": len(kept)}
    by_block = {name: [value[index] for index in kept] for name, value in lists.items() if len(value) == blocks}
    indices = {name: [kept.index(i) for i in v if i in kept] for name, v in lists.items() if _are_indices(v, blocks)}
    for changes in ({**by_block, **number}, {**by_block, **indices, **number}):
        found = _fitting(layout.model, config, expected, [changes])
        if found is not None and _alike(layout, kept, config, found):
            return found
    raise UserError(
        f"Pattern blocks needs a configuration that says which blocks there are, but that of {type(layout.model).__name__} "
        f"cannot say that {len(kept)} of {blocks} are left. Use another pattern."
    )


def _are_indices(values: list[Any], number: int) -> bool:
    return all(type(v) is int and 0 <= v < number for v in values) and values == sorted(set(values))


def _fitting(
    model: PreTrainedModel, config: PretrainedConfig, expected: Shapes, changes: Iterable[dict[str, Any]]
) -> PretrainedConfig | None:
    """The first changed configuration of which a model has the expected shapes. None if there is none."""
    for change in changes:
        changed = _changed(config, change)
        if changed is not None and _has_shapes(model, changed, expected):
            return changed
    return None


def _alike(layout: DecoderLayout, kept: Sequence[int], before: PretrainedConfig, after: PretrainedConfig) -> bool:
    """Whether the blocks of a configuration have the settings of those that are kept, such as attention windows."""
    old = without_weights(layout.model, before)
    new = without_weights(layout.model, after)
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
        validate = getattr(text, "validate", None)
        if validate is not None:  # as from_pretrained does
            validate()
        type(config).from_dict(changed.to_dict())  # as it will be read
    except Exception:  # huggingface_hub's validation has classes of its own
        return None
    return changed


def _has_shapes(model: PreTrainedModel, config: PretrainedConfig, expected: Shapes) -> bool:
    try:
        return _shapes(without_weights(model, config)) == expected
    except Exception:  # a setting that this value does not suit
        return False


def _shapes(model: PreTrainedModel) -> Shapes:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def without_weights(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device."""
    plain: Any = plain_class(model)
    with torch.device("meta"):
        found: PreTrainedModel = plain(config)
    return found


def plain_class(model: PreTrainedModel) -> type:
    """The model's class. FSDP2 changes that of a sharded module to one that derives from it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
