"""What is removed from a model as a whole: hidden units, heads, decoder blocks, or a mixture that meets a budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsellm_lightning.allocation.depth import choose_blocks
from sparsellm_lightning.allocation.divergence import OutputProbe, restoring
from sparsellm_lightning.allocation.sensitivity import STATISTICS_TOKENS, BlockStatistics
from sparsellm_lightning.architecture import Block, DecoderLayout, Projection
from sparsellm_lightning.calibration import ActivationCache, Context, run_block
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import Shrinkage, check_shrinkable, fixed_shrinkage
from sparsellm_lightning.runtime import tracked
from sparsellm_lightning.solvers import refit_columns, surgeon

_TIMINGS = 5  # forwards of a block, of whose seconds the median counts

Damage = Callable[[int], float]
"""Number of units or heads removed from every block -> divergence of the output, summed over the blocks."""


@dataclass(frozen=True)
class Cost:
    """Parameters of a decoder block's projections, or seconds of a forward of the block.

    Args:
        units: the part that is proportional to the number of hidden units.
        heads: the part that is proportional to the number of heads.
        rest: the constant part.
    """

    units: float
    heads: float
    rest: float

    def of(self, units: float, heads: float) -> float:
        """With these shares of the units and heads."""
        return self.units * units + self.heads * heads + self.rest


def choose_shrinkage(context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch]) -> Shrinkage:
    """What the settings' pattern removes. Which blocks, and how a budget is divided, is measured on the dense model.

    Args:
        context: of the run.
        cache: activations in front of the first block.
        batches: this rank's calibration windows, those of the cache.

    Raises:
        UserError: a budget that cannot be met; blocks without which no configuration describes the model; see also
            :func:`~sparsellm_lightning.allocation.choose_blocks`.
    """
    if context.config.budget is not None:
        return _spend(context, cache, batches)
    found = fixed_shrinkage(context.layout, context.config)
    if not found.blocks:
        return found
    found = replace(found, blocks=frozenset(choose_blocks(context, cache, batches, len(found.blocks))))
    check_shrinkable(context.layout, found)
    return found


def _spend(context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch]) -> Shrinkage:
    """The mixture of units, heads and blocks of least damage that meets the budget.

    Damages of units, heads and blocks are added. Those of units and heads are measured at the number that alone would meet the
    budget, and scaled to other numbers by the local error. Those of blocks are measured in the order of their removal.
    Nothing is tuned meanwhile, because tuning repairs about the same share of each.
    """
    config, layout = context.config, context.layout
    assert config.budget is not None
    name, share = config.budget
    costs = [_parameters(block) for block in layout.blocks]
    if name == "latency":
        costs = _seconds(context, cache.beginning(STATISTICS_TOKENS, context.ranks))
    limit = share * sum(cost.of(1, 1) for cost in costs)
    total = len(layout.blocks)
    by_cost = sorted(cost.of(1, 1) for cost in costs)
    # The number of blocks that is enough even if the cheapest ones are removed.
    enough = next(n for n in range(total + 1) if sum(by_cost[n:]) <= limit * (1 + 1e-9))
    # The last windows, because the first ones give the statistics: on these a refit looks better than it is.
    probing = batches[::-1]
    damage_of_units, damage_of_heads = _damages(context, cache, probing, 1 - share)
    try:
        leaving = choose_blocks(context, cache, probing, min(enough, total - 1))
    except UserError:  # blocks that are more than a sum: units and heads have to do
        leaving = {}

    def damage(mixture: tuple[Shrinkage, float]) -> float:
        found, of_blocks = mixture
        inside = damage_of_units(layout.units - (found.units or layout.units))
        inside += damage_of_heads(layout.heads - (found.heads or layout.heads))
        return of_blocks + inside * (total - len(found.blocks)) / total

    for shrinkage, _ in sorted(_mixtures(layout, costs, limit, config.round_to, leaving), key=damage):
        try:
            check_shrinkable(layout, shrinkage)
        except UserError:  # such as a number of heads that the configuration refuses
            continue
        return shrinkage
    raise UserError(
        f"A budget must be met by leaving out hidden units, heads and blocks, but no mixture brings "
        f"{type(layout.model).__name__} to {share:g} of its {name}. Raise the share, lower round_to, or choose another pattern."
    )


def _mixtures(
    layout: DecoderLayout, costs: Sequence[Cost], limit: float, step: int, leaving: Mapping[int, float]
) -> Iterator[tuple[Shrinkage, float]]:
    """Mixtures within the limit, each with as many units as fit, and the damage of the removed blocks.

    Args:
        layout: of the model.
        costs: by block.
        limit: on their sum.
        step: the number of units is a multiple of it, or all.
        leaving: the divergence after each removed block, in order.
    """
    for number in range(len(leaving) + 1):
        gone = list(leaving)[:number]
        left = [cost for index, cost in enumerate(costs) if index not in gone]
        for heads in range(layout.heads, 0, -1) if layout.heads else [0]:
            units = _units_within(left, limit, heads / layout.heads if layout.heads else 1.0, layout.units, step)
            if units is not None:
                smaller = units if units < layout.units else None, heads if heads < layout.heads else None
                yield Shrinkage(*smaller, frozenset(gone)), leaving[gone[-1]] if gone else 0.0


def _units_within(left: Sequence[Cost], limit: float, heads: float, width: int, step: int) -> int | None:
    """The largest number of hidden units, a multiple of ``step`` or all, that keeps the cost within a limit."""
    choices = [width, *range((width - 1) // step * step, 0, -step)]
    shares = {units: units / width if width else 1.0 for units in choices}  # where no units can be removed, all stay
    cost = {units: sum(cost.of(share, heads) for cost in left) for units, share in shares.items()}
    return next((units for units in choices if cost[units] <= limit * (1 + 1e-9)), None)


def _parameters(block: Block) -> Cost:
    units = sum(p.size for network in block.networks for p in network.projections)
    heads = 0 if block.attention is None else _head_parameters(block)
    total = sum(p.size for p in block.projections())
    return Cost(units, heads, total - units - heads)


def _head_parameters(block: Block) -> int:
    assert block.attention is not None
    return block.attention.output.size + sum(rows * p.shape[1] for p, _, rows in block.attention.spans())


def _seconds(context: Context, sample: ActivationCache) -> list[Cost]:
    """Median seconds of a forward of each block over one batch, summed over ranks: only their ratios count."""
    one, found = sample.part(range(min(len(sample.hidden), 1))), []  # a rank may have no windows
    for block in context.layout.blocks:
        of_units = {p.module for network in block.networks for p in network.projections}
        of_heads: dict[nn.Module, float] = {}  # share of the module's rows that are removed with heads
        if block.attention is not None:
            of_heads[block.attention.output.module] = 1.0
            for p, _, rows in block.attention.spans():
                of_heads[p.module] = of_heads.get(p.module, 0.0) + rows / p.shape[0]
        runs = []
        for _ in range(_TIMINGS):
            clock = _Clock(context.device)
            with ExitStack() as hooks:
                for module in of_units | of_heads.keys():
                    hooks.callback(module.register_forward_pre_hook(clock.start).remove)
                    hooks.callback(module.register_forward_hook(clock.stop).remove)
                start = clock.now()
                hidden = run_block(context, block, one)
                total = clock.now() - start
            units = sum(clock.seconds.get(module, 0.0) for module in of_units)
            heads = sum(share * clock.seconds.get(module, 0.0) for module, share in of_heads.items())
            runs.append((units, heads, total - units - heads))
        one.hidden = hidden
        medians = torch.tensor(
            [statistics.median(column) for column in zip(*runs, strict=True)],
            dtype=torch.float64,
            device=context.device,
        )
        context.ranks.sum_(medians)
        found.append(Cost(*medians.tolist()))
    return found


class _Clock:
    """Seconds inside modules, by hooks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[nn.Module, float] = {}
        self._started = 0.0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def start(self, module: nn.Module, args: Any) -> None:
        self._started = self.now()

    def stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seconds[module] = self.seconds.get(module, 0.0) + self.now() - self._started


def _damages(
    context: Context, cache: ActivationCache, probing: Sequence[CalibrationBatch], share: float
) -> tuple[Damage, Damage]:
    """Damage of removing a number of units, and of heads, from every block, on the first of the windows ``probing``.

    Each block is measured alone, at ``share`` of its units or heads. The sum is then scaled to the divergence with all blocks
    changed together, because removed blocks are measured together too.
    """
    layout = context.layout
    sample, probe = cache.beginning(STATISTICS_TOKENS, context.ranks), OutputProbe(context, probing)
    parts = [_Part(context, layout.units, share), _Part(context, layout.heads, share)]
    for block in tracked(layout.blocks, "Measuring sensitivity", "block"):
        inputs = BlockStatistics(context, block, sample)
        if layout.units:
            (network,) = block.networks
            parts[0].measure(probe, block, network.roles["down"], inputs)
        if layout.heads and block.attention is not None:
            parts[1].measure(probe, block, block.attention.output, inputs)
        probe.advance(block)
    probe.rewind()
    units, heads = (part.damage(probe) for part in parts)
    return units, heads


class _Part:
    """What removing groups of columns costs, such as the units of every block.

    Args:
        context: of the run. All ranks make one together.
        groups: number in every block. 0: there are none.
        share: of the groups, at which the model's output is measured.
    """

    def __init__(self, context: Context, groups: int, share: float) -> None:
        self.context, self.groups = context, groups
        self.at = min(max(round(share * groups), 1), groups - 1)
        self.curve = np.zeros(groups + 1)  # sum over blocks
        self.alone = 0.0  # sum of the divergences of single blocks
        self.removed: list[tuple[Projection, torch.Tensor]] = []  # projections without the groups, on the host

    def measure(self, probe: OutputProbe, block: Block, p: Projection, inputs: BlockStatistics) -> None:
        """Add a block's damages. The probe is in front of the block."""
        if self.at < 1:
            return
        adapter, statistics = self.context.adapter, inputs[p.name]
        dense = adapter.whole(p)
        size = p.shape[1] // self.groups
        order, errors = surgeon(dense, statistics, self.groups - 1, size)
        kept = torch.ones(self.groups, dtype=torch.bool, device=dense.device).index_fill_(0, order[: self.at], False)
        columns = kept.repeat_interleave(size)
        without = torch.zeros_like(dense)
        without[:, columns] = refit_columns(dense, statistics, columns)
        with restoring(self.context, [p]):
            adapter.write_whole(p, without)
            divergence = probe.divergence(block)
        counts, values = ([pair[i] for pair in errors] for i in (0, 1))
        curve = np.interp(np.arange(self.groups + 1), counts, values)
        self.curve += divergence * curve / (curve[self.at] or 1.0)
        self.alone += divergence
        self.removed.append((p, without.to(self.context.layout.model.dtype).cpu()))

    def damage(self, probe: OutputProbe) -> Damage:
        """Damage by number of groups. The probe is in front of the first block. Weights are restored."""
        if self.removed and self.alone:
            with restoring(self.context, [p for p, _ in self.removed]):
                for p, without in self.removed:
                    self.context.adapter.write_whole(p, without.to(self.context.device, torch.float32))
                self.curve *= probe.divergence(self.context.layout.blocks[0]) / self.alone
            self.removed.clear()
        return lambda number: float(self.curve[number])
