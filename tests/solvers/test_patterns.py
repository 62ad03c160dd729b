"""Patterns against a Python sort, for one process and for ranks simulated by threads."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import (
    SINGLE,
    NofM,
    Ranks,
    Stacked,
    Unstructured,
    _kth_smallest_over_ranks,
    parse_nofm,
    split_sizes,
)


@pytest.fixture(autouse=True, params=[0, 2**20], ids=["counted", "gathered"])
def _both_ways_to_a_threshold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsellm_lightning.patterns._GATHERED", request.param)


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
    assert (~per_row).sum(1).tolist() == [round(sparsity * 30)] * 7
    assert torch.equal(per_row, torch.stack([keep_largest(row, sparsity) for row in scores]))


def test_unstructured_takes_a_view() -> None:
    scores = make_scores("random", 12, 7).T
    assert torch.equal(Unstructured(0.6).select(scores), keep_largest(scores.clone(), 0.6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (2, 3)])
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
            assert int(kept_here.sum()) == kept
            assert values[kept_here].min() >= values[~kept_here].max()


def test_stacked_selects_each_matrix_on_its_own() -> None:
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


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8", "1:4", "2:3", "1:16"])
def test_parse(text: str) -> None:
    expected = None if text == "unstructured" else tuple(int(part) for part in text.split(":"))
    assert parse_nofm(text) == expected


@pytest.mark.parametrize(
    "text", ["4:2", "4:4", "0:4", "2-4", "2:", ":4", "-1:4", "2:4:8", "2:4\n", " 2:4", "", "dense", 24]
)
def test_parse_refuses(text: Any) -> None:
    with pytest.raises(UserError, match="kept:group") as caught:
        parse_nofm(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("ranks", range(1, 8))
def test_split_sizes_is_that_of_chunk(ranks: int) -> None:
    for rows in range(21):
        sizes = [len(part) for part in torch.arange(rows).chunk(ranks)]
        assert split_sizes(rows, ranks) == sizes + [0] * (ranks - len(sizes))
        held = [
            list(range(rows))[ThreadRanks(r, [None] * ranks, threading.Barrier(1)).local_rows(rows)]
            for r in range(ranks)
        ]
        assert [len(part) for part in held] == split_sizes(rows, ranks)
        assert list(itertools.chain(*held)) == list(range(rows))


def test_single_process_holds_everything() -> None:
    rows = torch.arange(6.0).view(3, 2)
    total = rows.clone()
    SINGLE.sum_(total)
    assert torch.equal(total, rows)
    assert torch.equal(SINGLE.gather(rows)[0], rows)
    assert torch.equal(SINGLE.gather_rows(rows, 3), rows)
    assert rows[SINGLE.local_rows(3)].shape == (3, 2)


# (2, 3) leaves the last of three ranks without rows, (4, 3) splits 2, 2, 0, (7, 2) splits 4, 3.
@pytest.mark.parametrize(("rows", "size"), [(6, 2), (7, 2), (7, 3), (4, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_smallest_over_ranks(rows: int, size: int, kind: str) -> None:
    scores = make_scores(kind, rows, 9, seed=rows)
    for fraction in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0):
        parts = on_ranks(size, lambda ranks, f=fraction: ~Unstructured(f, ranks).select(scores[ranks.local_rows(rows)]))
        assert torch.equal(~torch.cat(parts), keep_largest(scores, fraction)), fraction


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_kth_smallest_over_ranks(size: int, kind: str) -> None:
    scores = make_scores(kind, 4, 8)
    ordered = sorted(scores.flatten().tolist())

    def all_counts(ranks: Ranks) -> list[float]:
        flat = scores[ranks.local_rows(4)].flatten()
        return [float(_kth_smallest_over_ranks([flat], [count], ranks)[0][0]) for count in range(1, 33)]

    assert on_ranks(size, all_counts) == [ordered] * size


def test_select_over_ranks_keeps_stacked_matrices_apart() -> None:
    first, second = make_scores("ties", 5, 8), make_scores("random", 3, 8) * 100

    def select(ranks: Ranks) -> tuple[Tensor, ...]:
        parts = first[ranks.local_rows(5)], second[ranks.local_rows(3)]
        rows = [len(part) for part in parts]
        mask = Stacked([Unstructured(0.5, ranks), Unstructured(0.25, ranks)], rows).select(torch.cat(parts))
        return mask.split(rows)

    masks = [torch.cat(parts) for parts in zip(*on_ranks(3, select), strict=True)]
    assert torch.equal(masks[0], keep_largest(first, 0.5))
    assert torch.equal(masks[1], keep_largest(second, 0.25))
