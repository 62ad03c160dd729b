"""Splitting a global sparsity unevenly over the parts of a model.

A *part* is a set of projections that get one sparsity: those of a block, or a single one. Part i has n_i weights
(its size); whatever the rule, ``Σ n_i s_i = s Σ n_i`` holds to rounding, s being the sparsity asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsellm_lightning.errors import NumericalError, UserError

Curve = tuple[Sequence[float], Sequence[float]]
"""Sparsities, ascending, and the damage that pruning one part to each of them does."""

_STEP = 0.001  # of the grid on which damages are compared
_TIE = 1e-6  # relative difference up to which damages per weight count as equal
_FLOOR = 0.01  # damage taken for none at all, in units of the part's smallest positive one


def outlier_ratio(weight: Tensor, gram: Tensor, mean: float, multiple: float = 5.0) -> tuple[int, int]:
    """How many of a matrix's scores ``A_ij = |W_ij| · ‖X_j‖₂`` are outliers, above M times the mean, and how many there are.

    Section 3 of OWL (arXiv 2310.05175), where the mean is that of all projections of a block. Returned apart so that
    projections, and rows spread over ranks, can be summed before dividing.

    Args:
        weight: W, (rows, columns) float32; this rank's rows.
        gram: ``XᵀX / n``, (columns, columns) float32; the scale of the inputs cancels.
        mean: of the scores of the block, see :func:`score_sum`.
        multiple: M.
    """
    scores = _scores(weight, gram)
    return int((scores > multiple * mean).sum()), scores.numel()


def score_sum(weight: Tensor, gram: Tensor) -> tuple[float, int]:
    """Sum and number of the scores that :func:`outlier_ratio` counts."""
    scores = _scores(weight, gram)
    return float(scores.sum(dtype=torch.float64)), scores.numel()


def _scores(weight: Tensor, gram: Tensor) -> Tensor:
    return weight.abs() * gram.diagonal().clamp(min=0).sqrt()


def owl(outlier_ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """OWL (Yin et al., arXiv 2310.05175): the more outliers a part has, the less of it is pruned.

    Outlier ratios D map linearly to sparsities in a range of width 2λ, which is then moved to the mean asked for::

        d_i = (D_i − min D) / (max D − min D)        s_i = s + 2λ (Σ n_j d_j / Σ n_j − d_i)

    so the range is ``s ± λ`` only where the mean of d is a half. Equal ratios give equal sparsities.

    Args:
        outlier_ratios: D, one per part; any scale.
        sizes: n, weights in each part.
        sparsity: s.
        spread: λ; the paper's is 0.08 for most models at 70 %.

    Raises:
        UserError: a negative or infinite spread, or one that takes a part out of [0, 1].
        NumericalError: a ratio that is not finite.
    """
    _check_non_negative("spread", spread)
    if not all(map(math.isfinite, outlier_ratios)):
        raise NumericalError(f"Outlier ratios must be finite, got {list(outlier_ratios)}. Check the calibration text.")
    least, most = min(outlier_ratios), max(outlier_ratios)
    width = most - least or 1.0
    offsets = [-2 * spread * (ratio - least) / width for ratio in outlier_ratios]
    return _centred(offsets, sizes, sparsity, "spread", spread)


def atp(sizes: Sequence[int], sparsity: float, step: float) -> list[float]:
    """ATP (Huang et al., arXiv 2502.14770): sparsity rises with depth by a fixed step, as early errors grow on their way.

    ::

        s_l = s + β (l − Σ n_k k / Σ n_k)        l = 0, ..., L − 1

    where sizes are equal, the paper's ``s + β (l − (L − 1) / 2)``. The paper tries every β in steps of 0.002 up to
    ``2 min(s, 1 − s) / (L − 1)`` and keeps the one of lowest perplexity; :func:`atp_step` gives one without a search.

    Args:
        sizes: n, weights in each part, in order of depth.
        sparsity: s.
        step: β.

    Raises:
        UserError: a negative or infinite step, or one that takes a part out of [0, 1].
    """
    _check_non_negative("step", step)
    return _centred([step * depth for depth in range(len(sizes))], sizes, sparsity, "step", step)


def atp_step(parts: int, spread: float) -> float:
    """β of :func:`atp` for which the first and last of L parts are 2·spread apart: ``2·spread / (L − 1)``."""
    return 2 * spread / max(parts - 1, 1)


def minimise_damage(
    curves: Sequence[Curve], sizes: Sequence[int], sparsity: float, low: Sequence[float], high: Sequence[float]
) -> list[float]:
    """The sparsities of least total damage, given measured samples of the damage that pruning each part does.

    ::

        min Σ d_i(s_i)    subject to    Σ n_i s_i = s Σ n_i,    low_i ≤ s_i ≤ high_i

    Between samples, and beyond them, log damage is linear in sparsity; a sample below one at less sparsity is averaged with
    it (isotonic regression). d_i is the lower convex envelope of that within the bounds, as damage grows ever faster but for
    the kinks that the samples make. The minimum of such a sum has one damage per further weight in all parts that are within
    their bounds, so it is reached by pruning from the lower bounds on, always where the next weight does the least damage.

    The result is exact on a grid of 0.001 and depends on ratios of damages only. Parts in which the next weights do equal
    damage move together, so that parts alike get sparsities alike.

    Args:
        curves: of each part, at least two sparsities, ascending, and the damages there; none or less is taken for a
            hundredth of the part's smallest positive one.
        sizes: n, weights in each part.
        sparsity: s.
        low: least sparsity of each part.
        high: largest sparsity of each part.

    Raises:
        UserError: a curve of fewer than two ascending sparsities, bounds that are not ``0 ≤ low ≤ high ≤ 1``, or a sparsity
            that no choice within them gives.
        NumericalError: a damage that is not finite.
    """
    _check_reachable(sizes, sparsity, low, high)
    grids = [
        np.linspace(least, most, 1 + math.ceil((most - least) / _STEP)) for least, most in zip(low, high, strict=True)
    ]
    logs = [_log_damage(curve, grid) for curve, grid in zip(curves, grids, strict=True)]
    largest = max(float(log[-1]) for log in logs)

    # Damage per weight, part, and by how much its sparsity can grow at that price.
    moves: list[tuple[float, int, float]] = []
    for part, (grid, log, size) in enumerate(zip(grids, logs, sizes, strict=True)):
        width = (high[part] - low[part]) / max(len(grid) - 1, 1)
        rises = np.diff(np.exp(log - largest)).tolist()
        moves += [(rise / (width * size), part, steps * width) for rise, steps in _isotonic(rises)]
    moves.sort()

    result = list(low)
    missing = sum(size * (sparsity - least) for size, least in zip(sizes, low, strict=True))
    for tied in _ties(moves):
        room = sum(sizes[part] * growth for _, part, growth in tied)
        share = min(max(missing / room, 0.0), 1.0)
        for _, part, growth in tied:
            result[part] += share * growth
        missing -= share * room
    return [min(value, most) for value, most in zip(result, high, strict=True)]


def round_counts(sparsities: Sequence[float], entries: Sequence[int], total: int | None = None) -> list[int]:
    """How many weights to prune in each matrix: ``s_i n_i`` up or down, such that the sum is exact.

    The method of largest remainders: all are rounded down, then those that lost most are raised by one until the sum is
    ``total``; of equal ones, the first.

    Args:
        sparsities: of each matrix, in [0, 1].
        entries: n, weights in each.
        total: the sum of the counts; None is ``round(Σ s_i n_i)``.

    Raises:
        UserError: a sparsity outside [0, 1], or a total that rounding cannot give.
    """
    if not all(0 <= sparsity <= 1 for sparsity in sparsities):
        raise UserError(f"sparsities must be in [0, 1], got {list(sparsities)}. Write 0.7 for 70 %.")
    exact = [sparsity * count for sparsity, count in zip(sparsities, entries, strict=True)]
    if total is None:
        total = round(math.fsum(exact))
    counts = [math.floor(value) for value in exact]
    raisable = [index for index, count in enumerate(counts) if count < entries[index]]
    missing = total - sum(counts)
    if not 0 <= missing <= len(raisable):
        raise UserError(
            f"total must be what the sparsities give up to rounding, {sum(counts)} to {sum(counts) + len(raisable)}, "
            f"got {total}. Leave it out for {round(math.fsum(exact))}."
        )
    raisable.sort(key=lambda index: counts[index] - exact[index])
    for index in raisable[:missing]:
        counts[index] += 1
    return counts


def _centred(offsets: Sequence[float], sizes: Sequence[int], sparsity: float, name: str, value: float) -> list[float]:
    """Offsets moved so that their mean, weighted by size, is ``sparsity``; ``name`` is the argument that set their range."""
    mean = math.fsum(size * offset for size, offset in zip(sizes, offsets, strict=True)) / sum(sizes)
    result = [sparsity + offset - mean for offset in offsets]
    if not (min(result) >= 0 and max(result) <= 1):
        raise UserError(
            f"Every part's sparsity must be in [0, 1], but with {name} {value:g} around {sparsity:g} they go from "
            f"{min(result):.4g} to {max(result):.4g}. Use a smaller {name}."
        )
    return result


def _check_non_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(
            f"{name} must be non-negative and finite, got {value}. Write 0 for the same sparsity everywhere."
        )


def _check_reachable(sizes: Sequence[int], sparsity: float, low: Sequence[float], high: Sequence[float]) -> None:
    for part, (least, most) in enumerate(zip(low, high, strict=True)):
        if not 0 <= least <= most <= 1:
            raise UserError(
                f"Bounds must satisfy 0 <= low <= high <= 1, got low {least} and high {most} for part {part}. "
                "Write 0.5 and 0.9 to keep a part between 50 and 90 %."
            )
    reachable = [sum(n * bound for n, bound in zip(sizes, bounds, strict=True)) / sum(sizes) for bounds in (low, high)]
    if not reachable[0] - 1e-12 <= sparsity <= reachable[1] + 1e-12:
        raise UserError(
            f"sparsity must be what the parts' bounds allow, {reachable[0]:.4g} to {reachable[1]:.4g}, got {sparsity:g}. "
            "Widen the bounds, or ask for a sparsity between."
        )


def _log_damage(curve: Curve, sparsities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log damage at each of the sparsities: piecewise linear, never falling, the outer pieces going on beyond the samples."""
    at, damages = (np.asarray(values, dtype=np.float64) for values in curve)
    if at.shape != damages.shape or len(at) < 2 or not (np.diff(at) > 0).all():
        raise UserError(
            "A damage curve must have at least two sparsities, ascending, and a damage for each, got sparsities "
            f"{at.tolist()} and damages {damages.tolist()}. Sample the damage at the bounds and between."
        )
    if not np.isfinite(damages).all():
        raise NumericalError(
            f"Damages must be finite, got {damages.tolist()}. Check the calibration text, or sample less sparsity."
        )
    rising = [mean for mean, count in _isotonic(damages.tolist()) for _ in range(count)]
    floor = max(_FLOOR * min((damage for damage in rising if damage > 0), default=0.0), np.finfo(np.float64).tiny)
    logs = np.log(np.maximum(rising, floor))
    slopes = np.diff(logs) / np.diff(at)
    piece = np.clip(np.searchsorted(at, sparsities) - 1, 0, len(slopes) - 1)
    result: NDArray[np.float64] = logs[piece] + slopes[piece] * (sparsities - at[piece])
    return result


def _isotonic(values: Iterable[float]) -> list[tuple[float, int]]:
    """The closest rising sequence in least squares, as ``(value, how often)``, by pooling adjacent violators.

    Of the slopes of a curve, it gives those of the curve's lower convex envelope.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] >= mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return pools


def _ties(moves: Sequence[tuple[float, int, float]]) -> Iterable[Sequence[tuple[float, int, float]]]:
    """Sorted moves in runs of equal damage per weight."""
    start = 0
    while start < len(moves):
        stop = start + 1
        while stop < len(moves) and moves[stop][0] <= moves[start][0] * (1 + _TIE):
            stop += 1
        yield moves[start:stop]
        start = stop
