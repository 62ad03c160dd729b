"""The pattern that prunes given entries first, against a Python sort."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.ranks import on_ranks
from torch import Tensor

from sparsellm_lightning.solvers import Containing, NofM, Ranks, Stacked, Unstructured


def brute_force(scores: Tensor, given: Tensor, count: int) -> Tensor:
    """The kept entries, if all given entries are pruned, and then the smallest others until ``count`` are pruned."""
    flat = [
        (not g, s, i) for i, (s, g) in enumerate(zip(scores.flatten().tolist(), given.flatten().tolist(), strict=True))
    ]
    pruned = {i for _, _, i in sorted(flat)[:count]} | {i for free, _, i in flat if not free}
    return torch.tensor([i not in pruned for i in range(len(flat))]).view(scores.shape)


def scores_with_ties(rows: int, columns: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    scores = torch.rand(rows, columns, generator=generator)
    yield scores
    yield (scores * 4).floor()  # ties, and scores of zero at entries that are not given
    yield torch.zeros(rows, columns)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75])
def test_containing(sparsity: float, fraction: float) -> None:
    """Given entries are pruned with any score. If more are given than the pattern prunes, all of them are pruned."""
    for scores in scores_with_ties(6, 20):
        given = torch.rand(6, 20, generator=torch.Generator().manual_seed(1)) < fraction
        count = max(round(sparsity * 120), int(given.sum()))
        kept = Containing(Unstructured(sparsity), given).select(scores)
        assert torch.equal(kept, brute_force(scores, given, count))
        assert int((~kept).sum()) == count
        per_row = Containing(Unstructured(sparsity), given).select(scores, per_row=True)
        assert int((~per_row).sum()) == count
        share = (count - int(given.sum())) / max(int((~given).sum()), 1)
        for row in range(6):
            pruned = int((~per_row[row]).sum())
            assert abs(pruned - int(given[row].sum()) - share * int((~given[row]).sum())) <= 1
            assert torch.equal(per_row[row], brute_force(scores[row], given[row], pruned))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(7, 3), (2, 3)])
def test_ranks_choose_as_one_process(rows: int, size: int, per_row: bool) -> None:
    """Also with ranks that have no row."""
    for scores in scores_with_ties(rows, 20):
        given = torch.rand(rows, 20, generator=torch.Generator().manual_seed(1)) < 0.3

        def local(ranks: Ranks, scores: Tensor = scores, given: Tensor = given) -> Tensor:
            mine = ranks.local_rows(rows)
            return Containing(Unstructured(0.6, ranks), given[mine]).select(scores[mine], per_row=per_row)

        whole = Containing(Unstructured(0.6), given).select(scores, per_row=per_row)
        assert torch.equal(torch.cat(on_ranks(size, local)), whole)


def test_uneven_zeros() -> None:
    """What is decided apart loses the same share of its other entries, so that the matrix gets the pattern's sparsity."""
    scores = torch.rand(16, 32, generator=torch.Generator().manual_seed(0))
    given = torch.zeros(16, 32, dtype=torch.bool)
    given[:, :8] = True  # as a head that has left leaves the columns of its output
    pattern = Containing(Unstructured(0.5), given)
    kept = torch.cat([pattern.select(scores[:, at : at + 8], first_column=at) for at in range(0, 32, 8)], dim=1)
    assert (~kept).sum(0).split(8)[0].tolist() == [16] * 8
    assert [int((~part).sum()) for part in kept.split(8, dim=1)[1:]] == [43, 43, 43], "a third of 128"
    given = torch.zeros(16, 32, dtype=torch.bool)
    given[:4] = True  # as units that have left leave the rows of their inputs
    kept = Containing(Unstructured(0.5), given).select(scores, per_row=True)
    pruned = (~kept).sum(1)
    assert pruned[:4].tolist() == [32] * 4
    assert set(pruned[4:].tolist()) == {10, 11}
    assert int(pruned.sum()) == 256


def test_containing_by_columns_and_groups() -> None:
    """A sweep selects a few columns at a time. Stacked matrices and groups of four have masks of their own."""
    for scores in scores_with_ties(6, 20):
        given = torch.rand(6, 20, generator=torch.Generator().manual_seed(2)) < 0.3
        halves = Containing(Unstructured(0.5), given[:2]), Containing(Unstructured(0.75), given[2:])
        for first in (0, 8):
            columns = slice(first, first + 8)
            part, wanted = scores[:, columns], given[:, columns]
            both = Stacked(halves, [2, 4]).select(part, first_column=first)
            for rows, pattern in ((slice(2), halves[0]), (slice(2, 6), halves[1])):
                alone = pattern.select(part[rows], first_column=first)
                assert torch.equal(both[rows], alone)
                assert torch.equal(alone, brute_force(part[rows], wanted[rows], int((~alone).sum())))
            grouped = Containing(NofM(2, 4), given)
            assert grouped.group == 4
            chosen = grouped.select(part, first_column=first)
            for row in range(6):
                for start in range(0, 8, 4):
                    group = slice(start, start + 4)
                    assert torch.equal((~chosen[row, group]).sum(), torch.tensor(max(2, int(wanted[row, group].sum()))))
                    assert not bool((chosen[row, group] & wanted[row, group]).any())
