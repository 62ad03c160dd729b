"""Rules of uneven sparsity: exact sums, the published rules by definition, the optimum by enumeration and in closed form."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

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
from sparsellm_lightning.errors import NumericalError

SAMPLES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]


def mean(sparsities: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(size * sparsity for size, sparsity in zip(sizes, sparsities, strict=True)) / sum(sizes)


def log_damage(curve: Curve, sparsity: float) -> float:
    """Log damage of rising positive samples, linear between them."""
    (at, damages) = curve
    left = max([index for index in range(len(at) - 1) if at[index] <= sparsity], default=0)
    share = (sparsity - at[left]) / (at[left + 1] - at[left])
    return (1 - share) * math.log(damages[left]) + share * math.log(damages[left + 1])


def total_damage(curves: Sequence[Curve], sparsities: Sequence[float]) -> float:
    return sum(math.exp(log_damage(curve, sparsity)) for curve, sparsity in zip(curves, sparsities, strict=True))


def envelope(curve: Curve, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of the lower convex hull of a finely sampled damage curve, by Andrew's monotone chain."""
    hull: list[tuple[float, float]] = []
    for x in np.linspace(low, high, 1 + round((high - low) / 0.001)):
        y = math.exp(log_damage(curve, x))
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return np.array(hull).T[0], np.array(hull).T[1]


def random_curve(rng: random.Random, convex: bool) -> Curve:
    slopes = [rng.uniform(0, 20) for _ in SAMPLES[1:]]
    logs = [rng.uniform(-6, 0)]
    for slope, width in zip(sorted(slopes) if convex else slopes, np.diff(SAMPLES), strict=True):
        logs.append(logs[-1] + slope * width)
    return SAMPLES, [math.exp(log) for log in logs]


def test_outlier_ratio_counts_scores_above_a_multiple_of_the_mean() -> None:
    weight, gram = torch.ones(2, 4), torch.diag(torch.tensor([1.0, 1.0, 1.0, 900.0]))
    weight[1, 3] = -0.1
    # Scores 1 1 1 30 and 1 1 1 3: their mean is 39 / 8.
    total, count = score_sum(weight, gram.diagonal())
    assert (total, count) == (pytest.approx(39.0), 8)
    assert outlier_ratio(weight, gram.diagonal(), 39 / 8) == (1, 8)
    assert outlier_ratio(weight, gram.diagonal(), 39 / 8, multiple=0.5) == (2, 8)
    assert outlier_ratio(weight, gram.diagonal(), 0.5) == (2, 8)
    assert outlier_ratio(7 * weight, 9 * gram.diagonal(), 21 * 39 / 8) == (1, 8)
    assert outlier_ratio(torch.zeros(2, 4), gram.diagonal(), 0.0) == (0, 8)


def test_outliers_over_rows_of_ranks_and_projections() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 8, generator=generator) ** 3
    gram = torch.rand(8, generator=generator).diag()
    scores = weight.abs() * gram.diagonal().sqrt()
    sums = [score_sum(rows, gram.diagonal()) for rows in weight.split(5)]
    mean = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert mean == pytest.approx(float(scores.mean()))
    parts = [outlier_ratio(rows, gram.diagonal(), mean) for rows in weight.split(5)]
    assert tuple(map(sum, zip(*parts, strict=True))) == (int((scores > 5 * scores.mean()).sum()), 96)


def test_owl_by_its_definition() -> None:
    # d is 0, 0.25 and 1. Its weighted mean is (0 + 2 * 0.25 + 1) / 4.
    result = owl([0.01, 0.02, 0.05], [10, 20, 10], 0.7, 0.08)
    assert result == pytest.approx([0.7 + 0.16 * (0.375 - d) for d in (0, 0.25, 1)], abs=1e-12)
    assert owl([1, 2, 5], [10, 20, 10], 0.7, 0.08) == pytest.approx(result, abs=1e-12)
    assert owl([0.03] * 3, [1, 2, 3], 0.7, 0.08) == [0.7] * 3


@pytest.mark.parametrize("seed", range(8))
def test_owl_and_atp_keep_the_budget_the_order_and_the_range(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 10**8) for _ in range(rng.randint(2, 60))]
    ratios = [rng.random() for _ in sizes]
    result = owl(ratios, sizes, 0.7, 0.08)
    assert mean(result, sizes) == pytest.approx(0.7, abs=1e-12)
    assert max(result) - min(result) == pytest.approx(0.16, abs=1e-12)
    order = sorted(range(len(sizes)), key=ratios.__getitem__)
    assert all(result[fewer] >= result[more] for fewer, more in itertools.pairwise(order))

    result = atp(sizes, 0.7, 0.1)
    assert mean(result, sizes) == pytest.approx(0.7, abs=1e-12)
    assert result[-1] - result[0] == pytest.approx(0.2, abs=1e-12)
    assert np.diff(result) == pytest.approx(0.2 / (len(sizes) - 1), abs=1e-12)


def test_atp_of_equal_sizes_is_the_papers() -> None:
    assert atp([5] * 4, 0.7, 0.03) == pytest.approx([0.67, 0.69, 0.71, 0.73], abs=1e-12)
    assert atp([5], 0.7, 0.1) == [0.7]


def test_outlier_ratios_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="Outlier ratios"):
        owl([0.1, math.nan], [1, 1], 0.5, 0.08)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("convex", [True, False])
def test_least_damage_against_enumeration(seed: int, convex: bool) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 5) for _ in range(3)]
    curves = [random_curve(rng, convex) for _ in sizes]
    low, high = [rng.uniform(0.4, 0.6) for _ in sizes], [rng.uniform(0.75, 0.95) for _ in sizes]
    result = minimise_damage(curves, sizes, 0.68, low, high)
    assert mean(result, sizes) == pytest.approx(0.68, abs=1e-12)

    hulls = [envelope(*arguments) for arguments in zip(curves, low, high, strict=True)]
    first, second = (np.linspace(low[part], high[part], 200) for part in (0, 1))
    third = (0.68 * sum(sizes) - sizes[0] * first[:, None] - sizes[1] * second) / sizes[2]
    damage = np.interp(first, *hulls[0])[:, None] + np.interp(second, *hulls[1]) + np.interp(third, *hulls[2])
    best = damage[(third >= low[2]) & (third <= high[2])].min()
    found = sum(float(np.interp(sparsity, *hull)) for sparsity, hull in zip(result, hulls, strict=True))
    # Both have an error from kinks between points of their grids. The enumeration's grid is coarser.
    assert best * 0.99 < found <= best * 1.001
    if convex:
        # The curve is its own envelope.
        assert total_damage(curves, result) == pytest.approx(found, rel=1e-3)


def test_least_damage_of_exponential_curves_in_closed_form() -> None:
    # d_i = a_i exp(k_i s_i): one multiplier λ with λ n_i = a_i k_i exp(k_i s_i), found by bisection on its logarithm.
    scales, rates, sizes = [1e-4, 3e-4, 2e-4, 1e-3], [9.0, 7.0, 8.0, 6.0], [100, 250, 100, 300]

    def solution(log_multiplier: float) -> list[float]:
        return [(log_multiplier + math.log(n / (a * k))) / k for a, k, n in zip(scales, rates, sizes, strict=True)]

    least, most = -50.0, 50.0
    while most - least > 1e-12:
        middle = (least + most) / 2
        least, most = (middle, most) if mean(solution(middle), sizes) < 0.7 else (least, middle)
    expected = solution(least)
    assert 0.4 < min(expected) < max(expected) < 0.95

    at = [0.55, 0.7, 0.85]
    curves = [(at, [a * math.exp(k * s) for s in at]) for a, k in zip(scales, rates, strict=True)]
    result = minimise_damage(curves, sizes, 0.7, [0.4] * 4, [0.95] * 4)
    assert result == pytest.approx(expected, abs=2e-3)
    assert total_damage(curves, result) == pytest.approx(total_damage(curves, expected), rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_least_damage_keeps_budget_and_bounds(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 10**8) for _ in range(rng.randint(1, 40))]
    curves = [random_curve(rng, convex=False) for _ in sizes]
    low = [rng.uniform(0, 0.6) for _ in sizes]
    high = [rng.uniform(least, 1) if rng.random() < 0.9 else least for least in low]
    share = rng.choice([0.0, rng.random(), 1.0])
    sparsity = (1 - share) * mean(low, sizes) + share * mean(high, sizes)
    result = minimise_damage(curves, sizes, sparsity, low, high)
    assert mean(result, sizes) == pytest.approx(sparsity, abs=1e-9)
    assert all(least <= value <= most for least, value, most in zip(low, result, high, strict=True))
    assert result == minimise_damage(curves, sizes, sparsity, low, high)
    # Only ratios of damages count.
    scaled = [(at, [2.0**80 * damage for damage in damages]) for at, damages in curves]
    assert result == pytest.approx(minimise_damage(scaled, sizes, sparsity, low, high), abs=2e-3)


@pytest.mark.parametrize("convex", [True, False])
def test_equal_damage_per_weight_gives_equal_sparsities(convex: bool) -> None:
    at, damages = random_curve(random.Random(1), convex)
    sizes = [3, 7, 11]
    curves = [(at, [size * damage for damage in damages]) for size in sizes]
    assert minimise_damage(curves, sizes, 0.71234, [0.5] * 3, [0.9] * 3) == pytest.approx([0.71234] * 3, abs=1e-12)


def test_the_more_sensitive_part_is_pruned_less() -> None:
    at, damages = random_curve(random.Random(2), convex=True)
    curves = [(at, [factor * damage for damage in damages]) for factor in (4, 1, 2, 8)]
    result = minimise_damage(curves, [5] * 4, 0.7, [0.4] * 4, [0.95] * 4)
    assert result[1] > result[2] > result[0] > result[3]
    assert minimise_damage(curves[:1] * 2, [5, 10], 0.7, [0.4] * 2, [0.95] * 2)[0] < 0.7  # same damage, fewer weights


def test_damages_of_zero_below_zero_and_falling() -> None:
    harmless, harmful = (SAMPLES, [0, 0, -1, 0, 0, 0]), (SAMPLES, [0, 1, 2, 1.9, 8, 20])
    result = minimise_damage([harmless, harmful], [1, 1], 0.7, [0.5] * 2, [0.8] * 2)
    assert result == pytest.approx([0.8, 0.6], abs=1e-12)
    assert minimise_damage([harmless] * 2, [1, 3], 0.7, [0.5] * 2, [0.8] * 2) == pytest.approx([0.7] * 2)
    # Beyond its samples, a part's damage grows at the same rate: here tenfold for every 0.01.
    steep = ([0.5, 0.51], [0.1, 1])
    result = minimise_damage([steep, harmful], [1, 1], 0.7, [0.5] * 2, [0.9] * 2)
    assert 0.505 < result[0] < 0.515
    assert sum(result) == pytest.approx(1.4, abs=1e-12)


def test_damages_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match="Damages must be finite"):
        minimise_damage([([0.5, 0.6], [1.0, math.nan])], [1], 0.7, [0.5], [0.8])


@pytest.mark.parametrize("seed", range(8))
def test_counts_add_up_and_are_rounded(seed: int) -> None:
    rng = random.Random(seed)
    entries = [rng.randint(1, 10 ** rng.randint(1, 8)) for _ in range(rng.randint(1, 50))]
    # Like those of the rules: their mean over all weights is exact to rounding.
    sparsities = atp(entries, 0.6, 0.1)
    counts = round_counts(sparsities, entries)
    assert sum(counts) == round(0.6 * sum(entries))
    for count, sparsity, size in zip(counts, sparsities, entries, strict=True):
        assert 0 <= count <= size
        assert abs(count - sparsity * size) < 1 + 1e-6
    sparsities = [rng.choice([0.0, 1.0, rng.random()]) for _ in entries]
    exact = math.fsum(sparsity * size for sparsity, size in zip(sparsities, entries, strict=True))
    counts = round_counts(sparsities, entries)
    assert sum(counts) == round(exact)
    assert all(abs(c - s * n) < 1 and 0 <= c <= n for c, s, n in zip(counts, sparsities, entries, strict=True))


def test_largest_remainders_are_rounded_up() -> None:
    assert round_counts([0.32, 0.36, 0.32], [10, 10, 10]) == [3, 4, 3]
    assert round_counts([0.35, 0.35], [10, 10]) == [4, 3]
    assert round_counts([], []) == []


def test_above_floors() -> None:
    sparsities, sizes = [0.5, 0.6, 0.7], [10, 20, 30]
    assert above(sparsities, [0.1, 0.2, 0.3], sizes) == pytest.approx(sparsities)
    raised = above(sparsities, [0.62, 0.0, 0.0], sizes)
    assert raised == pytest.approx([0.62, 0.6 - 0.024, 0.7 - 0.024])  # 1.2 weights from the other 50
    assert mean(raised, sizes) == pytest.approx(mean(sparsities, sizes))
    raised = above(sparsities, [0.62, 0.59, 0.0], sizes)
    assert raised[:2] == pytest.approx([0.62, 0.59])
    assert mean(raised, sizes) == pytest.approx(mean(sparsities, sizes))
    assert above(sparsities, [0.8, 0.8, 0.8], sizes) == [0.8, 0.8, 0.8]
