"""The pattern that prunes given entries first, against a Python sort."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparsellm_lightning.solvers import Containing, NofM, Pattern, Stacked, Unstructured


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
        kept = Containing(Unstructured(sparsity), given).select(scores)
        assert torch.equal(kept, brute_force(scores, given, round(sparsity * 120)))
        assert int((~kept).sum()) == max(round(sparsity * 120), int(given.sum()))
        per_row = Containing(Unstructured(sparsity), given).select(scores, per_row=True)
        for row in range(6):
            assert torch.equal(per_row[row], brute_force(scores[row], given[row], round(sparsity * 20)))


def test_containing_by_columns_and_groups() -> None:
    """A sweep selects a few columns at a time. Stacked matrices and groups of four have masks of their own."""
    for scores in scores_with_ties(6, 20):
        given = torch.rand(6, 20, generator=torch.Generator().manual_seed(2)) < 0.3
        stacked_pattern: Pattern = Stacked([Unstructured(0.5), Unstructured(0.75)], [2, 4])
        for first in (0, 8):
            columns = slice(first, first + 8)
            part, wanted = scores[:, columns], given[:, columns]
            kept = Containing(Unstructured(0.5), given).select(part, first_column=first)
            assert torch.equal(kept, brute_force(part, wanted, 24))
            both = Containing(stacked_pattern, given).select(part, first_column=first)
            assert torch.equal(both[:2], brute_force(part[:2], wanted[:2], 8))
            assert torch.equal(both[2:], brute_force(part[2:], wanted[2:], 24))
            grouped = Containing(NofM(2, 4), given)
            assert grouped.group == 4
            chosen = grouped.select(part, first_column=first)
            for row in range(6):
                for start in range(0, 8, 4):
                    group = slice(start, start + 4)
                    assert torch.equal((~chosen[row, group]).sum(), torch.tensor(max(2, int(wanted[row, group].sum()))))
                    assert not bool((chosen[row, group] & wanted[row, group]).any())
