"""The structure of any causal language model, found by a probe and bound to the settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from sparsellm_lightning.architecture.blocks import decoder_blocks, unwrapped_names
from sparsellm_lightning.architecture.layout import (
    Block,
    DecoderLayout,
    Linears,
    Network,
    Projection,
    Unit,
)
from sparsellm_lightning.architecture.probe import RunModel, probe_blocks, run_base
from sparsellm_lightning.architecture.table import ARCHITECTURES, Architecture
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError

_FOUND: WeakKeyDictionary[PreTrainedModel, tuple[Architecture | None, list[Block], dict[nn.Module, str]]] = (
    WeakKeyDictionary()
)
"""By model: the table's row, the blocks that the probe found, and the names of their modules."""


def describe(model: PreTrainedModel, config: PruningConfig | None = None, run: RunModel = run_base) -> DecoderLayout:
    """Find a model's blocks and projections, and check that the settings can be applied to them.

    The first call for a model, or for another number of its blocks, probes it by forwards of 22 tokens, two of the model and a
    few of each block. Later calls only look up the modules, which may have been wrapped since.

    Args:
        model: any causal language model of ``transformers``.
        config: settings. None: the default settings, under which every projection is pruned.
        run: calls the model so that its blocks run. A sharded model needs its strategy's.

    Raises:
        UserError: a model that cannot be pruned block by block, or has nothing to prune; an ``ignore`` pattern that matches
            nothing; columns that do not divide by the N:M group; block indices outside the model.
    """
    config = config or PruningConfig()
    row = ARCHITECTURES.get(model.config.model_type)
    found = _FOUND.get(model)
    if found is None or found[0] is not row or len(found[1]) != len(decoder_blocks(model)):
        _check_weights(model)
        blocks = probe_blocks(model, run)
        names = unwrapped_names(model)
        used = {m for block in blocks for m in _modules(block)}
        _FOUND[model] = row, blocks, {module: names[module] for module in used}
    layout = DecoderLayout(model, list(_bound(model, config)))
    _check_untied(layout)
    _check_groups(layout, config)
    if "neurons" in config.removed_shares:
        _check_units(layout, config)
    if "heads" in config.removed_shares:
        _check_heads(layout, config)
    config.kept("blocks", len(layout.blocks))
    config.alternates_in(len(layout.blocks))
    _check_some_pruned(layout, config)
    return layout


def _modules(block: Block) -> Iterator[nn.Module]:
    yield block.module
    if block.replay is not None:
        yield block.replay.module
    for unit in block.units:
        yield unit.observed
        for network in unit.networks:
            yield network.observed
            yield network.output
        for p in unit.projections:
            yield p.module


def _bound(model: PreTrainedModel, config: PruningConfig) -> Iterator[Block]:
    """The blocks that were found, with the modules that the model has now, and the ignored projections left dense."""
    _, blocks, known = _FOUND[model]
    outer: dict[str, nn.Module] = {}
    inner: dict[str, nn.Module] = {}
    for module, name in unwrapped_names(model).items():  # a wrapper comes before what it holds
        outer.setdefault(name, module)
        inner[name] = module
    unmatched = set(config.ignore)
    may_leave = None if not config.removes or "blocks" in config.removes else _may_leave(blocks, config)

    def projection(p: Projection) -> Projection:
        holder = known[p.module]
        aliases = (p.name, holder, f"{holder}.{p.parameter_name}")
        matching = {pattern for pattern in config.ignore if any(_matches(name, pattern) for name in aliases)}
        unmatched.difference_update(matching)
        pruned = not matching and (may_leave is None or p.name in may_leave)
        return replace(p, module=inner[holder], pruned=pruned)

    def network(found: Network) -> Network:
        roles = {role: projection(p) for role, p in found.roles.items()}
        return replace(found, roles=roles, observed=inner[known[found.observed]], output=outer[known[found.output]])

    def unit(found: Unit) -> Unit:
        if isinstance(found, Linears):
            return Linears([projection(p) for p in found.projections])
        if isinstance(found, Network):
            return network(found)
        networks = [network(expert) for expert in found.networks]
        return replace(found, networks=networks, observed=inner[known[found.observed]])

    bound = []
    for block in blocks:
        units = [unit(found) for found in block.units]
        by_name = {p.name: p for one in units for p in one.projections}
        replay = block.replay and replace(
            block.replay, module=outer[known[block.replay.module]], last=by_name[block.replay.last.name]
        )
        attention = block.attention and replace(
            block.attention,
            output=by_name[block.attention.output.name],
            inputs=tuple((by_name[p.name], first) for p, first in block.attention.inputs),
        )
        bound.append(replace(block, module=outer[known[block.module]], units=units, replay=replay, attention=attention))
    if unmatched:
        first = ", ".join(p.name for p in bound[0].projections())
        raise UserError(
            f"Every ignore pattern must match a projection, but {sorted(unmatched)} match none. The first block's projections "
            f"are {first}; embeddings, norms, routers and the head are never pruned. Correct the patterns."
        )
    yield from bound


def _may_leave(blocks: Sequence[Block], config: PruningConfig) -> set[str]:
    """Names of the projections that lose rows or columns if neurons or heads are removed."""
    names = set()
    for block in blocks:
        if "neurons" in config.removes:
            names |= {p.name for network in block.networks for p in network.projections}
        if "heads" in config.removes and block.attention is not None:
            names |= {p.name for p in block.attention.projections}
    return names


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _check_weights(model: PreTrainedModel) -> None:
    """Refuse weights that are not there, or not numbers that can be pruned."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            f"Pruning needs weights that are not quantised, but {type(model).__name__} is. Load it without quantization_config."
        )
    every = getattr(model.config, "rescale_every", 0) or 0  # RWKV
    if 0 < every < model.config.num_hidden_layers:
        raise UserError(
            f"{type(model).__name__} divides weights by powers of two when it is evaluated, which would be saved. Set "
            f"model.config.rescale_every, which is {every}, to 0 before the first evaluation (model.pretrained: a folder whose "
            "config.json says 0)."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"Pruning needs weights in memory, but {name} is on the meta device (without data, or offloaded to disk). Load "
                "the model without device_map."
            )


def _check_some_pruned(layout: DecoderLayout, config: PruningConfig) -> None:
    """Refuse a model in which nothing would be pruned."""
    if not any(p.pruned for p in layout.projections()):
        reasons = sorted({reason for block in layout.blocks for reason in block.dense.values()})
        why = f"ignore names all: {', '.join(config.ignore)}" if config.ignore else "; ".join(reasons)
        raise UserError(
            f"Pruning needs a linear layer in a decoder block, but {type(layout.model).__name__} has none that can be pruned"
            f"{f' ({why})' if why else ''}. Change ignore, or give a model of plain linear layers."
        )


def _check_untied(layout: DecoderLayout) -> None:
    """Refuse to prune a parameter that another module uses too."""
    holders: dict[int, set[str]] = {}
    for name, parameter in layout.model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), set()).add(name)
    for block in layout.blocks:
        for p in block.projections():
            shared = holders.get(id(p.parameter), set())
            if p.pruned and len(shared) > 1:
                raise UserError(
                    f"A projection's weight must be used once, but {' and '.join(sorted(shared))} are one parameter. Solving "
                    "it for one place would change the other: copy it, or leave it dense with ignore."
                )


def _check_units(layout: DecoderLayout, config: PruningConfig) -> None:
    """Refuse pattern neurons for a model whose configuration could not say how many units are left."""
    if not layout.units:
        widths = sorted({network.roles["down"].shape[1] for network in layout.networks})
        raise UserError(
            "Pattern neurons needs one feed-forward network in every block, of one width, and no experts, but "
            f"{type(layout.model).__name__} has {len(layout.networks)} in {len(layout.blocks)} blocks, of widths {widths}. Use "
            "another pattern."
        )
    left = [p.name for network in layout.networks for p in network.projections if not p.pruned]
    if left:
        raise UserError(
            f"Pattern neurons removes equally many units from every block, but ignore names {left[0]}. Leave it out of ignore."
        )
    config.kept("neurons", layout.units)


def _check_heads(layout: DecoderLayout, config: PruningConfig) -> None:
    """Refuse pattern heads for a model whose heads cannot be removed one by one."""
    name = type(layout.model).__name__
    without = [block.name for block in layout.blocks if block.attention is None]
    if without:
        raise UserError(
            f"Pattern heads needs attention with removable heads in every block (queries, keys and values contiguous), but "
            f"{without[0]} of {name} has none. Use another pattern."
        )
    numbers = {(block.attention.heads, block.attention.groups) for block in layout.blocks if block.attention}
    if len(numbers) != 1:
        raise UserError(
            f"Pattern heads needs equally many heads in every block, but {name} has {sorted(numbers)} query and key-value "
            "heads. Use another pattern."
        )
    left = [p.name for b in layout.blocks if b.attention for p in b.attention.projections if not p.pruned]
    if left:
        raise UserError(
            f"Pattern heads removes equally many heads from every block, but ignore names {left[0]}. Leave it out of ignore."
        )
    config.kept("heads", layout.heads)


def _check_groups(layout: DecoderLayout, config: PruningConfig) -> None:
    wrong = [f"{p.name} ({p.shape[1]})" for p in layout.projections() if p.pruned and p.shape[1] % config.group]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"Pattern {config.pattern} needs input features that divide by {config.group}, not so in "
            f"{', '.join(wrong[:4])}{more}. Choose another pattern, or leave these dense with ignore."
        )
