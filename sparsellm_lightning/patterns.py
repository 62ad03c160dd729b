"""Sparsity patterns: given one score per weight, which weights to keep.

A pattern is a small object that solvers call with a matrix of scores and that answers with a boolean mask, ``True`` =
kept. It also knows over which ranks the rows of the matrix are spread, so that solvers need not: the threshold over a
whole matrix is exact whatever the number of ranks.

N:M patterns are written **kept:group**: ``2:4`` keeps 2 of every 4 consecutive weights of a row, ``1:4`` keeps 1 of 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.ranks import SINGLE, Ranks

_RADIX_BITS = 8


class Pattern:
    """Base of the patterns. ``group`` is the number of consecutive columns that must be decided together (1 = any)."""

    group: int = 1

    def select(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        """Mask (True = kept) of the highest scores.

        Args:
            scores: non-negative float32, (rows, columns); this rank's rows.
            per_row: keep the same number in every row, rather than one threshold for the matrix. N:M patterns are always
                per row and ignore it.

        Returns:
            bool, the shape of ``scores``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Unstructured(Pattern):
    """The fraction ``sparsity`` of all weights, anywhere. Exactly ``round(sparsity * n)`` are pruned, ties by position."""

    sparsity: float
    ranks: Ranks = SINGLE

    def select(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        if per_row:
            pruned = round(self.sparsity * scores.shape[1])
            mask = torch.ones_like(scores, dtype=torch.bool)
            # Stable sort: equal scores are pruned from the left, whatever the backend.
            order = scores.argsort(dim=1, stable=True)[:, :pruned]
            return mask.scatter_(1, order, False)
        return ~_smallest(scores, self.sparsity, self.ranks)


@dataclass(frozen=True)
class NofM(Pattern):
    """Keep the ``kept`` highest of every ``group`` consecutive weights of a row."""

    kept: int
    group: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    def select(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        rows, columns = scores.shape
        grouped = scores.reshape(rows, columns // self.group, self.group)
        order = grouped.argsort(dim=2, descending=True, stable=True)[..., : self.kept]
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, order, True).view(rows, columns)


@dataclass(frozen=True)
class Stacked(Pattern):
    """Several matrices with the same columns, stacked by rows: each is selected on its own.

    Lets q/k/v, or gate and up, go through one solver loop while thresholds stay per matrix. ``rows`` are this rank's.
    """

    patterns: Sequence[Pattern]
    rows: Sequence[int]

    @property
    def group(self) -> int:  # type: ignore[override]
        return max(pattern.group for pattern in self.patterns)

    def select(self, scores: Tensor, *, per_row: bool = False) -> Tensor:
        parts = zip(self.patterns, scores.split(list(self.rows)), strict=True)
        return torch.cat([pattern.select(part, per_row=per_row) for pattern, part in parts])


def parse_nofm(pattern: str) -> tuple[int, int] | None:
    """``(kept, group)`` of an N:M pattern such as ``"2:4"``, or None for ``"unstructured"``.

    Raises:
        UserError: neither ``unstructured`` nor kept:group with 0 < kept < group.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < group:
        raise UserError(
            f"pattern must be 'unstructured' or kept:group with 0 < kept < group, got {pattern!r}. "
            "Write '2:4' to keep 2 of every 4 weights."
        )
    return kept, group


def _smallest(scores: Tensor, fraction: float, ranks: Ranks) -> Tensor:
    """Mask of exactly ``round(fraction * n)`` smallest scores over all ranks; ties in row order, lower ranks first."""
    flat = scores.contiguous().view(-1)
    total = torch.tensor([flat.numel()], dtype=torch.int64, device=flat.device)
    ranks.sum_(total)
    count = round(fraction * int(total))
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if ranks.size == 1:
        threshold = flat.kthvalue(count).values if flat.device.type == "cpu" else flat.sort().values[count - 1]
    else:
        threshold = _kth_smallest_over_ranks(flat, count, ranks)
    below, ties = flat < threshold, flat == threshold
    counts = torch.stack([below.sum(), ties.sum()])
    per_rank = torch.stack(ranks.gather(counts))
    wanted_ties = count - int(per_rank[:, 0].sum()) - int(per_rank[: ranks.rank, 1].sum())
    if wanted_ties < int(counts[1]):
        ties &= ties.cumsum(0) <= wanted_ties
    return (below | ties).view_as(scores)


def _kth_smallest_over_ranks(flat: Tensor, count: int, ranks: Ranks) -> Tensor:
    """Exact k-th smallest of non-negative float32 values spread over ranks, by radix selection.

    The bits of a non-negative float order as integers do, so counting one byte at a time finds the value in four
    all-reduced histograms of 256 counts, however many values there are.
    """
    keys = (flat + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    candidates = keys
    prefix = 0
    for shift in range(32 - _RADIX_BITS, -1, -_RADIX_BITS):
        digits = (candidates >> shift) & (2**_RADIX_BITS - 1)
        histogram = torch.bincount(digits, minlength=2**_RADIX_BITS)
        ranks.sum_(histogram)
        cumulative = histogram.cumsum(0)
        digit = int((cumulative < count).sum())
        count -= int(cumulative[digit] - histogram[digit])
        prefix |= digit << shift
        candidates = candidates[digits == digit]
    return torch.tensor(prefix, dtype=torch.int32, device=flat.device).view(torch.float32)
