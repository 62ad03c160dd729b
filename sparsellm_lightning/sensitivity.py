"""What pruning each part of a model does to its output, measured on the dense model; and the sparsities that follow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from sparsellm_lightning.allocation import (
    Curve,
    atp,
    atp_step,
    minimise_damage,
    outlier_ratio,
    owl,
    round_counts,
    score_sum,
)
from sparsellm_lightning.architectures import Block, DecoderLayout, Projection, device_of
from sparsellm_lightning.calibration import CalibrationBatch, first_tokens
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.layers import LayerPruner
from sparsellm_lightning.products import coarse_dtype
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.statistics import Gram, check_finite
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Observer, Stream, enter_model, run_block, tail_logits

STATISTICS_TOKENS = 4096  # over all ranks, from which local errors are taken
OUTPUT_TOKENS = 512  # over all ranks, on which the model's output is compared
OUTPUT_LENGTH = 128  # tokens of one window among them: four windows of 128 tell as much as two of 512
TOKENS_TOGETHER = 128  # of which log-probabilities are in memory at a time, besides the dense model's
REPAIR = 1.0  # log of how much less damage behind the first block counts where all later ones are tuned to undo it


def allocate(
    layout: DecoderLayout,
    stream: Stream,
    batches: Sequence[CalibrationBatch],
    config: PruningConfig,
    adapter: StrategyAdapter,
) -> dict[str, float]:
    """A sparsity for every projection to be pruned; of all their weights the share asked for is zero, to the weight.

    ``atp`` and ``owl`` go by block. For ``error``, every projection is a part; part i is pruned alone, by the local solver
    (SparseGPT in place of ADMM, of which a tenth of the time does) with statistics of the dense model, and

        d_i(s) = KL_i(s₀) e_i(s) / e_i(s₀)

    is taken for the damage at sparsity s: KL is the divergence of the model's next-token distribution from the dense one's,
    e the local error ``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²``, and s₀ the sparsity asked for.

    Reconstruction with target ``model`` tunes every block to undo what the blocks before it left, so that what is lost early
    weighs less: of L blocks, damage in block l then counts ``exp(−ρ (L − 1 − l) / (L − 1))`` times, ρ = 1. SmolLM2-135M, on
    text it was not calibrated on, with a block's attention and feed-forward network as parts, had a perplexity of 66.9, 65.1
    and 64.5 with ρ = 0, 1 and 2 at 70 %, and of 135 and 162 with 1 and 2 at 80 %.

    Args:
        layout: the dense model's blocks; weights are changed and put back.
        stream: in front of the first block.
        batches: this rank's calibration windows, the stream's; the model's output is compared on the first of them.
        config: settings.
        adapter: of the strategy the model runs under.

    Raises:
        UserError: allocation ``error`` for a model without a language-model head.
    """
    if config.allocation == "error" and layout.model.get_output_embeddings() is None:
        raise UserError(
            f"allocation error compares next-token distributions, but {type(layout.model).__name__} has no language-model "
            "head. Use allocation owl, atp or uniform."
        )
    stopwatch = Stopwatch()  # the seconds of all this are one phase of the caller's
    solver = LayerPruner(config, adapter, stopwatch).name
    quick = replace(
        config, method="sparsegpt" if solver == "admm" else solver, refine="none", reconstruct=False, target="block"
    )
    layers = LayerPruner(quick, adapter, stopwatch)
    sparsity, spread = config.requested_sparsity, _spread(config)
    parts = [part for block in layout.blocks for part in _parts(block, apart=config.allocation == "error")]
    sizes = [sum(map(_size, part)) for part in parts]
    if not spread:
        chosen = [sparsity] * len(parts)
    elif config.allocation == "atp":
        chosen = atp(sizes, sparsity, atp_step(len(parts), spread))
    elif config.allocation == "owl":
        sample = _first_batches(stream, adapter, device_of(layout.model))
        ratios = []
        for block in layout.blocks:
            statistics = _statistics(block, sample, adapter, stopwatch, config.damping)
            ratios += [_outliers(part, statistics, adapter) for part in _parts(block, apart=False)]
        chosen = owl(ratios, sizes, sparsity, spread)
    else:
        curves = list(_damages(layout, stream, batches, layers, config, adapter, stopwatch))
        low, high = max(sparsity - spread, 0.0), sparsity + spread
        chosen = minimise_damage(curves, sizes, sparsity, [low] * len(parts), [high] * len(parts))
    flat = [(p, s) for part, s in zip(parts, chosen, strict=True) for p in part]
    entries = [_size(p) for p, _ in flat]
    counts = round_counts([s for _, s in flat], entries)
    return {p.name: count / n for (p, _), count, n in zip(flat, counts, entries, strict=True)}


def _parts(block: Block, apart: bool) -> list[list[Projection]]:
    """What of a block is to be pruned: every projection a part of its own, or all of them together, if any."""
    pruned = [p for p in block.projections() if p.pruned]
    return [[p] for p in pruned] if apart else [pruned] if pruned else []


def _size(p: Projection) -> int:
    return p.shape[0] * p.shape[1]


def _first_batches(stream: Stream, adapter: StrategyAdapter, device: torch.device) -> Stream:
    """So many batches, as many on every rank, that they have about ``STATISTICS_TOKENS`` over all ranks."""
    windows = len(stream.hidden[0]) if stream.hidden else 0
    first = torch.tensor([sum(stream.windows[:windows])], device=device)
    adapter.ranks.sum_(first)
    batches = max(1, round(STATISTICS_TOKENS / max(int(first), 1)))
    return stream.part(range(min(batches, len(stream.hidden))))


def _statistics(
    block: Block, sample: Stream, adapter: StrategyAdapter, stopwatch: Stopwatch, damping: float
) -> dict[str, InputStatistics]:
    """Statistics of every projection's input in the dense block, by name; moves the sample behind the block."""
    device = device_of(block.module)
    beside = [p for role, p in block.feed_forward.items() if role != "down"]
    groups = [*block.attention, beside, [block.feed_forward["down"]]]
    groups = [group for group in groups if any(p.pruned for p in group)]
    grams = [Gram(group[0].shape[1], device) for group in groups]
    observers: list[Observer] = [(group[0].module, gram.add) for group, gram in zip(groups, grams, strict=True)]
    sample.hidden = run_block(block, sample, adapter, stopwatch, on_input=observers)
    statistics: dict[str, InputStatistics] = {}
    for group, gram in zip(groups, grams, strict=True):
        mean = gram.mean(adapter.ranks)
        check_finite(mean, group[0].name)
        statistics |= dict.fromkeys((p.name for p in group), InputStatistics(mean, damping, group[0].name))
    return statistics


def _outliers(part: list[Projection], statistics: dict[str, InputStatistics], adapter: StrategyAdapter) -> float:
    """OWL's share of outliers of a part, over all ranks: scores far above the mean of the whole part."""
    weights = [(adapter.read_rows(p), statistics[p.name].gram) for p in part]
    device = weights[0][0].device
    mean = torch.tensor([score_sum(*weight) for weight in weights], dtype=torch.float64, device=device).sum(0)
    adapter.ranks.sum_(mean)
    counts = [outlier_ratio(*weight, mean=float(mean[0] / mean[1])) for weight in weights]
    total = torch.tensor(counts, dtype=torch.float64, device=device).sum(0)
    adapter.ranks.sum_(total)
    return float(total[0] / total[1])


class _Damages:
    """Damage curves of the parts of a dense model, block by block."""

    def __init__(
        self,
        layout: DecoderLayout,
        probe: Stream,
        layers: LayerPruner,
        adapter: StrategyAdapter,
        stopwatch: Stopwatch,
        autocast: torch.dtype | None,
    ) -> None:
        self.layout, self.layers, self.adapter, self.stopwatch = layout, layers, adapter, stopwatch
        self.autocast = autocast
        self.probe = probe
        ends = self._run_to_end(0)
        # Half the memory of float32; bfloat16 would blur what small projections do.
        self.dense = [log_probabilities.half() for log_probabilities in self._log_probabilities(ends)]

    def curve(self, block: Block, p: Projection, inputs: InputStatistics, at: Sequence[float]) -> Curve:
        """Damage of pruning one projection alone to some sparsities, the middle one of which is tried on the model."""
        dense = self.adapter.read_rows(p)
        pruned = [self.layers.prune({p.name: p}, {p.name: dense}, {p.name: dense}, inputs, s)[p.name] for s in at]
        errors = [self.layers.error(dense, rows, inputs) for rows in pruned]
        self.adapter.write_rows(p, pruned[len(at) // 2])
        divergence = self._divergence(self._run_to_end(block.index))
        self.adapter.write_rows(p, dense)
        reference = errors[len(at) // 2] or 1.0
        return at, [divergence * error / reference for error in errors]

    def advance(self, block: Block) -> None:
        """Move the probe behind a block."""
        with self._products():
            self.probe.hidden = run_block(block, self.probe, self.adapter, self.stopwatch)

    def _run_to_end(self, first: int) -> list[Tensor]:
        """The probe's hidden states behind the last block; it stands in front of the block ``first``."""
        moving = replace(self.probe, hidden=list(self.probe.hidden))
        with self._products():
            for block in self.layout.blocks[first:]:
                moving.hidden = run_block(block, moving, self.adapter, self.stopwatch)
        return moving.hidden

    def _log_probabilities(self, ends: list[Tensor]) -> Iterator[Tensor]:
        """(tokens, vocabulary) float32, of some tokens after the others."""
        for hidden in ends:  # one call a batch: ranks have as many batches, but not as many windows in them
            with self._products():
                logits = tail_logits(self.layout, hidden.to(device_of(self.layout.model)), self.adapter)
            for tokens in logits.flatten(0, 1).split(TOKENS_TOGETHER):
                yield torch.log_softmax(tokens.float(), -1).clamp(min=-1e4)  # of no weight, and finite in float16

    def _divergence(self, ends: list[Tensor]) -> float:
        """Mean over all ranks' valid tokens of the Kullback-Leibler divergence from the dense model's distribution."""
        device = device_of(self.layout.model)
        total = torch.zeros(2, dtype=torch.float64, device=device)
        masks = [
            tokens for mask in self.probe.valid if mask is not None for tokens in mask.flatten().split(TOKENS_TOGETHER)
        ]
        for now, before, valid in zip(self._log_probabilities(ends), self.dense, masks, strict=True):
            dense = before.float()
            p, q = dense.exp(), now.exp()
            # Terms that are never negative: what rounding takes from the dense one then counts squared, not as it is.
            divergence = (p * (dense - now) - p + q).sum(-1)[valid.to(device)]
            total += torch.stack([divergence.sum(dtype=torch.float64), total.new_tensor(len(divergence))])
        self.adapter.ranks.sum_(total)
        return max(float(total[0] / total[1]), 0.0)

    def _products(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_of(self.layout.model).type, self.autocast)


def _damages(
    layout: DecoderLayout,
    stream: Stream,
    batches: Sequence[CalibrationBatch],
    layers: LayerPruner,
    config: PruningConfig,
    adapter: StrategyAdapter,
    stopwatch: Stopwatch,
) -> Iterator[Curve]:
    """Damage curves of the parts, in order."""
    sparsity, spread = config.requested_sparsity, _spread(config)
    at = (max(sparsity - spread, 0.0), sparsity, sparsity + spread)
    device = device_of(layout.model)
    dtype = coarse_dtype(device, config.solver_precision == "float32")
    # Only comparisons follow from it, so the products may be coarse.
    stored = next(layout.model.parameters()).dtype
    coarse = dtype if stored == torch.float32 != dtype else None
    sample = _first_batches(stream, adapter, device_of(layout.model))
    output_on = first_tokens(batches, OUTPUT_TOKENS, OUTPUT_LENGTH, adapter.ranks)
    probe = enter_model(layout, output_on, 0, adapter, stopwatch)
    damages = _Damages(layout, probe, layers, adapter, stopwatch, coarse)
    for block in layout.blocks:
        statistics = _statistics(block, sample, adapter, stopwatch, config.damping)
        weight = _lasting(block.index, len(layout.blocks), config)
        for (p,) in _parts(block, apart=True):
            sparsities, curve = damages.curve(block, p, statistics[p.name], at)
            yield sparsities, [weight * damage for damage in curve]
        damages.advance(block)


def _lasting(block: int, blocks: int, config: PruningConfig) -> float:
    """The weight of damage in a block, given what the blocks after it are tuned to undo."""
    if not config.reconstruct or config.target != "model":
        return 1.0
    return math.exp(-REPAIR * (blocks - 1 - block) / max(blocks - 1, 1))


def _spread(config: PruningConfig) -> float:
    """Such that no part is pruned whole."""
    return min(config.allocation_spread, 0.5 * (1 - config.requested_sparsity))
