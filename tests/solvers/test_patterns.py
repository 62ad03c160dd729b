"""Patterns against a Python sort, for one process and with threads as ranks."""

from __future__ import annotations

import pytest
import torch
from support.local import keep_largest
from support.ranks import on_ranks
from torch import Tensor

from sparsellm_lightning.solvers import NofM, Ranks, Stacked, Unstructured
from sparsellm_lightning.solvers.patterns import _kth_smallest_over_ranks


@pytest.fixture(params=[0, 2**20], ids=["counted", "gathered"])
def _both_ways_to_a_threshold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks find a threshold by counting scores in histograms, or by gathering all scores if these are few."""
    monkeypatch.setattr("sparsellm_lightning.solvers.patterns._GATHERED", request.param)


def make_scores(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    if kind == "ties":
        scores = (scores * 3).floor()
    elif kind == "zeros":
        scores *= torch.rand(rows, columns, generator=generator) > 0.7
    elif kind == "constant":
        scores.fill_(0.25)
    elif kind == "wide":  # denormals to 1e38, both zeros, and infinity
        scores = torch.exp2(scores * 270 - 145)
        scores.view(-1)[::5] = torch.tensor([0.0, -0.0]).repeat(scores.numel())[: len(scores.view(-1)[::5])]
        scores.view(-1)[3] = float("inf")
    return scores


KINDS = ["random", "ties", "zeros", "constant", "wide"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.25, 0.5, 0.7, 0.999])
def test_unstructured(kind: str, sparsity: float) -> None:
    scores = make_scores(kind, 7, 30)
    pattern = Unstructured(sparsity)
    whole = pattern.select(scores)
    assert whole.dtype == torch.bool
    assert int((~whole).sum()) == round(sparsity * 210)
    assert torch.equal(whole, keep_largest(scores, sparsity))
    per_row = pattern.select(scores, per_row=True)
    counts = (~per_row).sum(1)
    assert int(counts.sum()) == round(sparsity * 210), "the mean over rows is exact"
    assert int(counts.max() - counts.min()) <= 1
    expected = [keep_largest(row, int(count) / 30) for row, count in zip(scores, counts, strict=True)]
    assert torch.equal(per_row, torch.stack(expected))


def test_the_number_of_pruned_weights_is_rounded_once() -> None:
    """0.7 of 3 rows, of 35 columns each, is a little below 73.5 in floating point; 0.7 of 105 weights is 73.5."""
    assert int((~Unstructured(0.7).select(make_scores("random", 3, 35))).sum()) == round(0.7 * 105) == 74


@pytest.mark.parametrize("count", [1, 2, 4_000, 9_999])
def test_many_scores(count: int) -> None:
    """A partition sorts few scores as a whole, so that a wrong place in it shows only among many."""
    scores = torch.rand(100, 100, generator=torch.Generator().manual_seed(count))
    pruned = ~Unstructured(count / 10_000).select(scores)
    assert torch.equal(scores[pruned].sort().values, scores.flatten().sort().values[:count])


def test_scores_may_be_a_view() -> None:
    scores = make_scores("random", 12, 7).T
    assert torch.equal(Unstructured(0.6).select(scores), keep_largest(scores.clone(), 0.6))


@pytest.mark.parametrize("kind", ["random", "ties", "wide"])
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (2, 3), (5, 12)])
@pytest.mark.parametrize("per_row", [False, True])
def test_nofm(kind: str, kept: int, group: int, per_row: bool) -> None:
    scores = make_scores(kind, 5, 24)
    pattern = NofM(kept, group)
    mask = pattern.select(scores, per_row=per_row)
    assert mask.dtype == torch.bool
    assert pattern.group == group
    assert pattern.sparsity == pytest.approx((group - kept) / group)
    for row in range(5):
        for start in range(0, 24, group):
            values, kept_here = scores[row, start : start + group], mask[row, start : start + group]
            highest = sorted(range(group), key=lambda place: (-values[place], place))[:kept]  # ties by position
            assert kept_here.nonzero().flatten().tolist() == sorted(highest)


def test_stacked_matrices_have_their_own_thresholds() -> None:
    scores = make_scores("random", 9, 24) * torch.tensor([1.0] * 2 + [100.0] * 4 + [0.01] * 3)[:, None]
    small, middle, large = scores[:2], scores[2:6], scores[6:]
    pattern = Stacked([Unstructured(0.5), Unstructured(0.75), Unstructured(0.0)], [2, 4, 3])
    assert pattern.group == 1
    expected = torch.cat([keep_largest(small, 0.5), keep_largest(middle, 0.75), keep_largest(large, 0.0)])
    assert torch.equal(pattern.select(scores), expected)
    rows = [keep_largest(row, s) for row, s in zip(scores, [0.5] * 2 + [0.75] * 4 + [0.0] * 3, strict=True)]
    assert torch.equal(pattern.select(scores, per_row=True), torch.stack(rows))
    nofm = Stacked([NofM(2, 4), NofM(1, 4)], [4, 5])
    assert nofm.group == 4
    counts = nofm.select(scores).view(9, 6, 4).sum(2)
    assert (counts[:4] == 2).all()
    assert (counts[4:] == 1).all()


# (7, 2) splits 4, 3. (4, 3) splits 2, 2, 0. (2, 3) splits 1, 1, 0.
@pytest.mark.usefixtures("_both_ways_to_a_threshold")
@pytest.mark.parametrize(("rows", "size"), [(7, 2), (7, 3), (4, 3), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_over_ranks(rows: int, size: int, kind: str) -> None:
    scores = make_scores(kind, rows, 9, seed=rows)
    for fraction in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0):
        for known in (None, rows):

            def select(ranks: Ranks, fraction: float = fraction, known: int | None = known) -> Tensor:
                return Unstructured(fraction, ranks, known).select(scores[ranks.local_rows(rows)])

            assert torch.equal(torch.cat(on_ranks(size, select)), keep_largest(scores, fraction)), (fraction, known)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_kth_smallest_over_ranks(size: int, kind: str) -> None:
    scores = make_scores(kind, 4, 8)
    ordered = sorted(scores.flatten().tolist())

    def all_counts(ranks: Ranks) -> list[float]:
        flat = scores[ranks.local_rows(4)].flatten()
        return [float(_kth_smallest_over_ranks([flat], [count], ranks)[0][0]) for count in range(1, 33)]

    assert on_ranks(size, all_counts) == [ordered] * size


@pytest.mark.usefixtures("_both_ways_to_a_threshold")
def test_stacked_matrices_over_ranks_have_their_own_thresholds() -> None:
    first, second = make_scores("ties", 5, 8), make_scores("random", 3, 8) * 100

    def select(ranks: Ranks) -> tuple[Tensor, ...]:
        parts = first[ranks.local_rows(5)], second[ranks.local_rows(3)]
        rows = [len(part) for part in parts]
        mask = Stacked([Unstructured(0.5, ranks), Unstructured(0.25, ranks)], rows).select(torch.cat(parts))
        return mask.split(rows)

    masks = [torch.cat(parts) for parts in zip(*on_ranks(3, select), strict=True)]
    assert torch.equal(masks[0], keep_largest(first, 0.5))
    assert torch.equal(masks[1], keep_largest(second, 0.25))
