"""The split of rows over ranks, and the exchanges of integers, with threads as ranks."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from support.ranks import ThreadRanks, on_ranks

from sparsellm_lightning.solvers import SINGLE, Ranks


@pytest.mark.parametrize("ranks", range(1, 8))
def test_rows_are_split_like_torch_chunk(ranks: int) -> None:
    for rows in range(21):
        sizes = [len(part) for part in torch.arange(rows).chunk(ranks)]
        held = [
            list(range(rows))[ThreadRanks(rank, [None] * ranks, threading.Barrier(1)).local_rows(rows)]
            for rank in range(ranks)
        ]
        assert [len(part) for part in held] == sizes + [0] * (ranks - len(sizes))
        assert list(itertools.chain(*held)) == list(range(rows))


def test_single_process_holds_every_row() -> None:
    rows = torch.arange(6.0).view(3, 2)
    total = rows.clone()
    SINGLE.sum_(total)
    assert torch.equal(total, rows)
    assert [torch.equal(part, rows) for part in SINGLE.gather(rows)] == [True]
    assert torch.equal(SINGLE.gather_rows(rows, 3), rows)
    first = SINGLE.gather_rows_to_first(rows, 3)
    assert first is not None
    assert torch.equal(first, rows)
    assert rows[SINGLE.local_rows(3)].shape == (3, 2)


def test_integers_of_a_single_process() -> None:
    assert SINGLE.gather_counts(3, -7) == [[3, -7]]
    assert SINGLE.total(3, -7) == [3, -7]
    assert SINGLE.largest(-7) == -7
    assert SINGLE.all(True) is True
    assert SINGLE.all(False) is False


@pytest.mark.parametrize("size", [2, 3])
def test_integers_of_all_ranks(size: int) -> None:
    # More than 2**53, which float64 would round, and more than 2**31.
    mine = [(2**53 + 1, 5), (2**31, -20), (7, 0)][:size]

    def exchange(ranks: Ranks) -> tuple[list[list[int]], list[int], int, int]:
        first, second = mine[ranks.rank]
        return (
            ranks.gather_counts(first, second),
            ranks.total(first, second),
            ranks.largest(second),
            ranks.largest(-ranks.rank),
        )

    expected = (
        [list(pair) for pair in mine],
        [sum(first for first, _ in mine), sum(second for _, second in mine)],
        max(second for _, second in mine),
        0,
    )
    assert on_ranks(size, exchange) == [expected] * size


@pytest.mark.parametrize("conditions", itertools.product([False, True], repeat=3))
def test_all_is_true_if_every_rank_says_so(conditions: tuple[bool, ...]) -> None:
    assert on_ranks(3, lambda ranks: ranks.all(conditions[ranks.rank])) == [all(conditions)] * 3


def test_all_is_a_barrier() -> None:
    arrived: list[int] = []

    def meet(ranks: Ranks) -> int:
        time.sleep(0.1 * ranks.rank)
        arrived.append(ranks.rank)
        ranks.all(True)
        return len(arrived)

    assert on_ranks(3, meet) == [3, 3, 3]
