"""Rules that divide a sparsity unevenly over the parts of a model.

A *part* is a set of projections that get one sparsity: those of a block, or a single one. Part i has n_i weights (its size).
Every rule keeps the mean, ``Σ n_i s_i = s Σ n_i`` to rounding, where s is the sparsity asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsellm_lightning.errors import NumericalError

Curve = tuple[Sequence[float], Sequence[float]]
"""Sparsities, ascending, and the damage of pruning one part to each of them."""

_STEP = 0.001  # of the grid on which damages are compared
_TIE = 1e-6  # relative difference up to which damages per weight count as equal
_FLOOR = 0.01  # smallest damage of a part, in units of its smallest positive one


def outlier_ratio(weight: Tensor, squares: Tensor, mean: float, multiple: float = 5.0) -> tuple[int, int]:
    """Number of a matrix's scores ``A_ij = |W_ij| · ‖X_j‖₂`` above M times the mean, and number of scores.

    Section 3 of OWL (arXiv 2310.05175), with the mean over all projections of a block. Two numbers, so that projections and
    ranks can be summed before dividing.

    Args:
        weight: W, (rows, columns) float32, this rank's rows.
        squares: ``‖X_j‖² / n``, the diagonal of the Gram matrix, (columns,) float32. The scale of the inputs cancels.
        mean: of the scores of the block, see :func:`score_sum`.
        multiple: M.
    """
    scores = _scores(weight, squares)
    return int((scores > multiple * mean).sum()), scores.numel()


def score_sum(weight: Tensor, squares: Tensor) -> tuple[float, int]:
    """Sum and number of the scores that :func:`outlier_ratio` counts."""
    scores = _scores(weight, squares)
    return float(scores.sum(dtype=torch.float64)), scores.numel()


def _scores(weight: Tensor, squares: Tensor) -> Tensor:
    return weight.abs() * squares.clamp(min=0).sqrt()


def owl(outlier_ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """OWL (Yin et al., arXiv 2310.05175): parts with more outliers get less sparsity.

    Outlier ratios D map linearly to sparsities in a range of width 2λ. The range is then shifted to the mean asked for::

        d_i = (D_i − min D) / (max D − min D)        s_i = s + 2λ (Σ n_j d_j / Σ n_j − d_i)

    The range is ``s ± λ`` only if the mean of d is a half. Equal ratios give equal sparsities.

    Args:
        outlier_ratios: D of each part, on any scale.
        sizes: n, weights in each part.
        sparsity: s.
        spread: λ, at most ``min(s, 1 − s) / 2``: then every part stays in [0, 1]. The paper uses 0.08 for most models at 70 %.

    Raises:
        NumericalError: a ratio that is not finite.
    """
    if not all(map(math.isfinite, outlier_ratios)):
        raise NumericalError(f"Outlier ratios must be finite, got {list(outlier_ratios)}. Check the calibration text.")
    least, most = min(outlier_ratios), max(outlier_ratios)
    width = most - least or 1.0
    offsets = [-2 * spread * (ratio - least) / width for ratio in outlier_ratios]
    return _centred(offsets, sizes, sparsity)


def atp(sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """ATP (Huang et al., arXiv 2502.14770): sparsity rises with depth by a fixed step, because early errors grow with depth.

    ::

        s_l = s + β (l − Σ n_k k / Σ n_k)        l = 0, ..., L − 1

    With equal sizes this is the paper's ``s + β (l − (L − 1) / 2)``. The paper searches for the β of lowest perplexity, in
    steps of 0.002 up to ``2 min(s, 1 − s) / (L − 1)``. Here it follows from the spread: ``β = 2·spread / (L − 1)``.

    Args:
        sizes: n, weights in each part, in order of depth.
        sparsity: s.
        spread: half of the difference between the last part and the first.
    """
    step = 2 * spread / max(len(sizes) - 1, 1)
    return _centred([step * depth for depth in range(len(sizes))], sizes, sparsity)


def minimise_damage(
    curves: Sequence[Curve], sizes: Sequence[int], sparsity: float, low: Sequence[float], high: Sequence[float]
) -> list[float]:
    """The sparsities of least total damage, from samples of the damage of pruning each part.

    ::

        min Σ d_i(s_i)    subject to    Σ n_i s_i = s Σ n_i,    low_i ≤ s_i ≤ high_i

    Between and beyond samples, log damage is linear in sparsity. Isotonic regression first makes the samples rise. d_i is the
    lower convex envelope of that curve within the bounds. At the minimum of a sum of convex curves, one more weight does the
    same damage in every part that is within its bounds. So the minimum is reached from the lower bounds by always pruning
    where the next weight does the least damage.

    The result is exact on a grid of 0.001 and depends on ratios of damages only. Parts with equal damage per weight move
    together, so that equal parts get equal sparsities.

    Args:
        curves: of each part, at least two ascending sparsities and the damages there. The smallest damage counted is a
            hundredth of the part's smallest positive one.
        sizes: n, weights in each part.
        sparsity: s.
        low: least sparsity of each part.
        high: largest sparsity of each part. s lies between the means of both, weighted by size.

    Raises:
        NumericalError: a damage that is not finite.
    """
    grids = [
        np.linspace(least, most, 1 + math.ceil((most - least) / _STEP)) for least, most in zip(low, high, strict=True)
    ]
    logs = [_log_damage(curve, grid) for curve, grid in zip(curves, grids, strict=True)]
    largest = max(float(log[-1]) for log in logs)

    # Each move: damage per weight, part, and the growth of its sparsity at that damage.
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


def above(sparsities: Sequence[float], floors: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Sparsities of the same mean that are at least the floors: ``max(s_i − δ, f_i)``, with one δ ≥ 0 for all parts.

    If the floors alone have a larger mean, they are returned.

    Args:
        sparsities: s.
        floors: f, least sparsity of each part.
        sizes: n, weights in each part.
    """

    def shifted(by: float) -> list[float]:
        return [max(s - by, floor) for s, floor in zip(sparsities, floors, strict=True)]

    total = math.fsum(size * s for size, s in zip(sizes, sparsities, strict=True))
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings: more than float64 resolves
        middle = (low + high) / 2
        more = math.fsum(size * s for size, s in zip(sizes, shifted(middle), strict=True)) > total
        low, high = (middle, high) if more else (low, middle)
    return shifted(high)


def round_counts(sparsities: Sequence[float], entries: Sequence[int]) -> list[int]:
    """Number of weights to prune in each matrix: ``s_i n_i`` rounded up or down, with an exact sum.

    The method of largest remainders: all are rounded down, then those with the largest remainders are raised by one until the
    sum is ``round(Σ s_i n_i)``. Of equal remainders the first is raised.

    Args:
        sparsities: of each matrix, in [0, 1].
        entries: n, weights in each.
    """
    exact = [sparsity * count for sparsity, count in zip(sparsities, entries, strict=True)]
    counts = [math.floor(value) for value in exact]
    raisable = [index for index, count in enumerate(counts) if count < entries[index]]
    missing = round(math.fsum(exact)) - sum(counts)
    raisable.sort(key=lambda index: counts[index] - exact[index])
    for index in raisable[:missing]:
        counts[index] += 1
    return counts


def _centred(offsets: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """Offsets shifted so that their mean, weighted by size, is ``sparsity``."""
    mean = math.fsum(size * offset for size, offset in zip(sizes, offsets, strict=True)) / sum(sizes)
    return [sparsity + offset - mean for offset in offsets]


def _log_damage(curve: Curve, sparsities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log damage at each of the sparsities: piecewise linear, never falling, extrapolated beyond the samples."""
    at, damages = (np.asarray(values, dtype=np.float64) for values in curve)
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
    """The closest rising sequence in least squares, as ``(value, repetitions)``, by pooling adjacent violators.

    Applied to the slopes of a curve, it gives the slopes of the curve's lower convex envelope.
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
