"""The sparsity of every projection under an uneven allocation, measured on the dense model where the rule needs it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsellm_lightning.allocation.divergence import OutputProbe, restoring
from sparsellm_lightning.allocation.rules import (
    Curve,
    above,
    atp,
    minimise_damage,
    outlier_ratio,
    owl,
    round_counts,
    score_sum,
)
from sparsellm_lightning.architecture import Block, Experts, Network, Projection
from sparsellm_lightning.calibration import (
    ActivationCache,
    Context,
    LayerSolver,
    RoutedTokens,
    feed_forward_of,
    run_block,
)
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.runtime import tracked
from sparsellm_lightning.solvers import Gram, InputStatistics

STATISTICS_TOKENS = 4096  # tokens, over all ranks, of the statistics for local errors and outliers
DISCOUNT = 1.0  # exponent that discounts damage in early blocks, because tuning later blocks partly repairs it


def allocate(context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch]) -> dict[str, float]:
    """The sparsity of every projection to be pruned, by name. Their mean, weighted by size, is the requested sparsity.

    ``sparsity · size`` is a whole number. A solver may round again, by up to half a weight per mask decision: each matrix of a
    fused projection, and every 128 columns in SparseGPT.

    ``atp``, ``owl`` and ``kl_blocks`` have one part per block. For ``kl`` every projection is a part, but the experts of a
    block have one part per role. For ``kl`` and ``kl_blocks``, part i is pruned alone, by the local solver (SparseGPT in place
    of ADMM) with statistics of the dense model, and its damage at sparsity s is taken to be

        d_i(s) = KL_i(s₀) e_i(s) / e_i(s₀)

    where KL is the divergence of the model's next-token distribution from the dense model's, e the sum of the projections'
    local errors ``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²``, and s₀ the sparsity asked for, or the largest s of the curve where pruning to s₀
    changes nothing (gradual pruning).

    Reconstruction with target ``model`` tunes every block to repair the errors of the blocks before it. Then damage in block
    l of L counts ``exp(−ρ (L − 1 − l) / (L − 1))`` times, ρ = :data:`DISCOUNT`.

    Args:
        context: of the run. The dense model's weights are changed and restored.
        cache: activations in front of the first block.
        batches: this rank's calibration windows, those of the cache.

    Raises:
        UserError: allocation ``kl`` or ``kl_blocks`` for a model without a language-model head.
        NumericalError: a ratio, damage or input that is not finite.
    """
    config, layout = context.config, context.layout
    sparsity, spread = config.requested_sparsity, _spread(config)
    parts = [part for block in layout.blocks for part in _parts(block, apart=config.allocation == "kl")]
    sizes = [sum(p.size for p in part) for part in parts]
    if not spread:
        chosen = [sparsity] * len(parts)
    elif config.allocation == "atp":
        chosen = atp(sizes, sparsity, spread)
    elif config.allocation == "owl":
        chosen = owl(list(_outlier_ratios(context, cache)), sizes, sparsity, spread)
    else:
        curves = list(_damages(context, cache, batches))
        low, high = max(sparsity - spread, 0.0), sparsity + spread
        chosen = minimise_damage(curves, sizes, sparsity, [low] * len(parts), [high] * len(parts))
    projections = [p for part in parts for p in part]
    sizes = [p.size for p in projections]
    chosen = [s for part, s in zip(parts, chosen, strict=True) for _ in part]
    if context.keep_zeros:  # what is zero stays so, and the others get less for it
        zeros = context.ranks.total(*(int(context.adapter.count_zeros(p)) for p in projections))
        chosen = above(chosen, [count / size for count, size in zip(zeros, sizes, strict=True)], sizes)
    return {p.name: n / p.size for p, n in zip(projections, round_counts(chosen, sizes), strict=True)}


def _parts(block: Block, apart: bool) -> list[list[Projection]]:
    """The projections of a block that are pruned: each a part of its own (experts by role), or all together as one part."""
    if not apart:  # the projections of each expert one after the other, because they share statistics
        together = [p for p in block.projections() if p.pruned]
        return [together] if together else []
    parts: list[list[Projection]] = []
    for unit in block.units:
        if isinstance(unit, Experts):
            parts += [[network.roles[role] for network in unit.networks] for role in unit.networks[0].roles]
        else:
            parts += [[p] for p in unit.projections]
    parts = [[p for p in part if p.pruned] for part in parts]
    return [part for part in parts if part]


def _spread(config: PruningConfig) -> float:
    """The spread of the settings, limited so that the sparsity of every part stays between 0 and 1."""
    spread = min(config.allocation_spread, 0.5 * (1 - config.requested_sparsity))
    if config.allocation in ("owl", "atp"):  # the others are cut off at 0
        spread = min(spread, 0.5 * config.requested_sparsity)
    return spread


class BlockStatistics:
    """Statistics of the inputs of a dense block's projections. Moves the sample behind the block.

    Args:
        context: of the run. All ranks make one together.
        block: dense.
        sample: activations in front of the block.
    """

    def __init__(self, context: Context, block: Block, sample: ActivationCache) -> None:
        self.context = context
        self.experts: dict[str, tuple[RoutedTokens, int, Network]] = {}
        self.last: tuple[object, InputStatistics] | None = None  # those of an expert that were asked for last
        groups: list[list[Projection]] = []
        for unit in block.units:
            if isinstance(unit, Experts):
                routed = RoutedTokens(context, block, sample, unit)
                for index, network in enumerate(unit.networks):
                    self.experts |= {p.name: (routed, index, network) for p in network.projections}
            else:
                groups += [unit.first, [unit.roles["down"]]] if isinstance(unit, Network) else [unit.projections]
        groups = [group for group in groups if any(p.pruned for p in group)]
        grams = [Gram(group[0].shape[1], context.device) for group in groups]
        observers = [(group[0].module, gram.add) for group, gram in zip(groups, grams, strict=True)]
        sample.hidden = run_block(context, block, sample, inputs=observers)
        self.shared: dict[str, InputStatistics] = {}
        for group, gram in zip(groups, grams, strict=True):
            statistics = gram.statistics(context.config.damping, context.ranks, group[0].name)
            self.shared |= dict.fromkeys((p.name for p in group), statistics)

    def __getitem__(self, name: str) -> InputStatistics:
        """Statistics of a projection's input. An expert's are computed anew, unless the last access was for the same input."""
        if name in self.shared:
            return self.shared[name]
        routed, index, network = self.experts[name]
        down = name == network.roles["down"].name
        key = (network.roles["down"].name, down)
        if self.last is None or self.last[0] != key:
            self.last = None  # one Gram matrix is in memory at a time
            self.last = key, self._of_expert(routed, index, network, down, name)
        return self.last[1]

    def _of_expert(self, routed: RoutedTokens, index: int, network: Network, down: bool, name: str) -> InputStatistics:
        tokens = routed.of(index, borrowing_below=network.roles["down"].shape[1]).fitted()
        feed_forward = feed_forward_of(self.context, network)
        gram = Gram(feed_forward.up.shape[int(not down)], self.context.device)
        for x, weights in zip(tokens.x.split(tokens.chunks), tokens.weights.split(tokens.chunks), strict=True):
            x = x.to(self.context.device, torch.float32, non_blocking=True)
            gram.add((feed_forward.hidden(x) if down else x) * weights.sqrt()[:, None])
        return gram.statistics(self.context.config.damping, self.context.ranks, name)


def _outlier_ratios(context: Context, cache: ActivationCache) -> Iterator[float]:
    """OWL's share of outliers of each part, over all ranks: scores far above the mean of the part."""
    sample = cache.beginning(STATISTICS_TOKENS, context.ranks)
    for block in context.layout.blocks:
        statistics = BlockStatistics(context, block, sample)
        for part in _parts(block, apart=False):
            # Copies of the diagonals, so that one Gram matrix is in memory at a time.
            weights = [(context.adapter.read_rows(p), statistics[p.name].gram.diagonal().clone()) for p in part]
            sums = torch.tensor(
                [score_sum(*weight) for weight in weights], dtype=torch.float64, device=context.device
            ).sum(0)
            context.ranks.sum_(sums)
            mean = float(sums[0] / sums[1])
            counts = [outlier_ratio(*weight, mean=mean) for weight in weights]
            outliers, scores = context.ranks.total(*map(sum, zip(*counts, strict=True)))
            yield outliers / scores


def _damages(context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch]) -> Iterator[Curve]:
    """Damage curves of the parts, in order."""
    config, blocks = context.config, context.layout.blocks
    sparsity, spread = config.requested_sparsity, _spread(config)
    at = (max(sparsity - spread, 0.0), sparsity, sparsity + spread)
    sample = cache.beginning(STATISTICS_TOKENS, context.ranks)
    probe = OutputProbe(context, batches)
    solver = LayerSolver(context)
    if solver.name == "admm":  # slower than SparseGPT, and only ratios of errors matter here
        solver = LayerSolver(context, solver="sparsegpt")
    for block in tracked(blocks, "Measuring sensitivity", "block"):
        statistics = BlockStatistics(context, block, sample)
        weight = depth_discount(block.index, len(blocks), config)
        for part in _parts(block, apart=config.allocation == "kl"):
            damages = _curve(context, solver, probe, block, part, statistics, at)
            yield at, [weight * damage for damage in damages]
        probe.advance(block)


def depth_discount(block: int, blocks: int, config: PruningConfig) -> float:
    """The weight of damage in a block, because tuning later blocks partly repairs it."""
    if not config.reconstruction_steps or config.target != "model":
        return 1.0
    return math.exp(-DISCOUNT * (blocks - 1 - block) / max(blocks - 1, 1))


def _curve(
    context: Context,
    solver: LayerSolver,
    probe: OutputProbe,
    block: Block,
    part: Sequence[Projection],
    statistics: BlockStatistics,
    at: Sequence[float],
) -> list[float]:
    """Damage of pruning one part alone to each sparsity. The model's output is measured at the middle one.

    Or at the last one, if pruning to the middle one changes nothing.
    """
    errors, written = [0.0] * len(at), []
    measured = len(at) // 2

    def pruned(p: Projection, dense: Tensor, inputs: InputStatistics, s: float) -> Tensor:
        return solver.prune({p.name: p}, {p.name: dense}, {p.name: dense}, inputs, s)[p.name]

    for p in part:
        inputs, dense = statistics[p.name], context.adapter.read_rows(p)
        rows = [pruned(p, dense, inputs, s) for s in at]
        errors = [error + solver.error(dense, new, inputs) for error, new in zip(errors, rows, strict=True)]
        written.append(rows[measured].to(p.parameter.dtype).cpu())  # a mixture's block may be large
    if not errors[measured]:
        measured = len(at) - 1
        written = [pruned(p, context.adapter.read_rows(p), statistics[p.name], at[-1]) for p in part]
    with restoring(context, part):
        for p, new in zip(part, written, strict=True):
            context.adapter.write_rows(p, new.to(context.device))
        divergence = probe.divergence(block)
    reference = errors[measured] or 1.0
    return [divergence * error / reference for error in errors]
