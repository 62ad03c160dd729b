"""Sparsity patterns: from one score per weight to the mask of kept weights.

A solver calls a pattern with a matrix of scores and gets a bool mask, ``True`` = kept. The pattern also knows the ranks that
hold the other rows of the matrix. The threshold over the whole matrix is exact for any number of ranks.

N:M patterns are written **kept:group**: ``2:4`` keeps 2 of every 4 consecutive weights of a row, ``1:4`` keeps 1 of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparsellm_lightning.solvers.ranks import SINGLE, Ranks

_RADIX_BITS = 11  # 32 bits in three steps
_GATHERED = 2**20  # largest number of scores, over all ranks, that are exchanged instead of counted


class Pattern:
    """Base of the patterns.

    Attributes:
        group: number of consecutive columns that are decided together. 1: any.
        ranks: hold the other rows of the matrix.
    """

    group: int = 1
    ranks: Ranks = SINGLE

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        """Mask (True = kept) of the highest scores.

        Args:
            scores: non-negative float32, (rows, columns); this rank's rows.
            per_row: keep the same number in every row (to rounding), instead of one threshold for the matrix. N:M patterns
                ignore this argument, because they are always per row.
            first_column: index of the first of these columns in the whole matrix.

        Returns:
            bool, the shape of ``scores``.
        """
        raise NotImplementedError

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        """The same pattern for some rows.

        Args:
            rows: indices into this rank's rows.
            counts: of a stack, how many of them are of each matrix.
        """
        return self


@dataclass(frozen=True)
class Unstructured(Pattern):
    """The fraction ``sparsity`` of all weights, anywhere. Exactly ``round(sparsity * n)`` are pruned, ties by position.

    Args:
        sparsity: in [0, 1).
        ranks: hold the other rows of the matrix.
        rows: number of rows over all ranks. None: the ranks count them.
        first_row: position of this rank's first row, if rows are not spread evenly over the ranks.
    """

    sparsity: float
    ranks: Ranks = SINGLE
    rows: int | None = None
    first_row: int | None = None

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        if per_row:
            # A stable sort prunes equal scores from the left on every backend.
            order = scores.argsort(dim=1, stable=True)
            kept = torch.arange(scores.shape[1], device=scores.device) >= self._row_counts(scores)[:, None]
            return torch.zeros_like(kept).scatter_(1, order, kept)
        return ~_smallest([scores], [self.count(scores)], self.ranks)[0]

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        return replace(self, rows=None, first_row=None)

    def _row_counts(self, scores: Tensor) -> Tensor:
        """Number of entries to prune in each of these rows. Rows differ by one at most, so that the sum over all is exact."""
        pruned, rows, _ = self._counts(scores)
        first = self.ranks.local_rows(rows).start if self.first_row is None else self.first_row
        ends = torch.arange(first, first + scores.shape[0] + 1, device=scores.device) * pruned // max(rows, 1)
        return ends.diff()

    def count(self, scores: Tensor) -> tuple[int, int]:
        """Number of entries to prune over all ranks, and largest number of rows that a rank may hold."""
        pruned, _, largest = self._counts(scores)
        return pruned, largest

    def _counts(self, scores: Tensor) -> tuple[int, int, int]:
        """Entries to prune and rows over all ranks, and the largest number of rows that a rank may hold."""
        if self.rows is None:
            held = [rows for (rows,) in self.ranks.gather_counts(scores.shape[0])]
            rows, largest = sum(held), max(held)
        else:
            rows = self.rows
            largest = -(-rows // self.ranks.size) if self.first_row is None else rows
        return round(self.sparsity * (rows * scores.shape[1])), rows, largest


@dataclass(frozen=True)
class NofM(Pattern):
    """Keep the ``kept`` highest of every ``group`` consecutive weights of a row. Columns must be a multiple of ``group``."""

    kept: int
    group: int
    ranks: Ranks = SINGLE

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.group

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        rows, columns = scores.shape
        grouped = scores.reshape(rows, columns // self.group, self.group)
        order = grouped.argsort(dim=2, descending=True, stable=True)[..., : self.kept]
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, order, True).view(rows, columns)


@dataclass(frozen=True)
class Stacked(Pattern):
    """Several matrices with the same columns, stacked by rows. Each has its own pattern and threshold.

    Args:
        patterns: of each matrix.
        rows: number of rows of each matrix on this rank.
    """

    patterns: Sequence[Pattern]
    rows: Sequence[int]

    @property
    def group(self) -> int:  # type: ignore[override]
        return max(pattern.group for pattern in self.patterns)

    @property
    def ranks(self) -> Ranks:  # type: ignore[override]
        return self.patterns[0].ranks

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        parts = scores.split(list(self.rows))
        flexible = [pattern for pattern in self.patterns if isinstance(pattern, Unstructured)]
        if len(flexible) == len(self.patterns) and not per_row:
            counts = [pattern.count(part) for pattern, part in zip(flexible, parts, strict=True)]
            return ~torch.cat(_smallest(parts, counts, flexible[0].ranks))
        together = zip(self.patterns, parts, strict=True)
        return torch.cat([pattern.select(part, per_row=per_row) for pattern, part in together])

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        return Stacked([pattern.of_rows(rows, counts) for pattern in self.patterns], counts)


@dataclass(frozen=True)
class Containing(Pattern):
    """A pattern that prunes given entries first. If more are given than the pattern prunes, all of them are pruned.

    Args:
        pattern: decides how many entries are pruned, and how they are grouped.
        pruned: (rows, columns of the whole matrix) bool, True = prune first; this rank's rows.
    """

    pattern: Pattern
    pruned: Tensor

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.pattern.group

    @property
    def ranks(self) -> Ranks:  # type: ignore[override]
        return self.pattern.ranks

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        pruned = self.pruned[:, first_column : first_column + scores.shape[1]]
        ranked = scores.clamp(min=torch.finfo(scores.dtype).tiny).masked_fill_(pruned, 0)
        return self.pattern.select(ranked, per_row=per_row) & ~pruned

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        return Containing(self.pattern.of_rows(rows, counts), self.pruned[rows])


def _smallest(matrices: Sequence[Tensor], counts: Sequence[tuple[int, int]], ranks: Ranks) -> list[Tensor]:
    """For each matrix, the mask of its ``count`` smallest scores over all ranks.

    Equal scores are taken in row order, lower ranks first. The matrices share every message between ranks.

    Args:
        matrices: this rank's rows of each matrix.
        counts: of each matrix, the number of scores to take and the largest number of rows that a rank may hold.
        ranks: hold the other rows.
    """
    flats = [matrix.contiguous().view(-1) for matrix in matrices]
    wanted = [count for count, _ in counts]
    if ranks.size == 1:
        found = [_kth_smallest(flat, count) for flat, count in zip(flats, wanted, strict=True)]
    elif ranks.size * sum(m.shape[1] * rows for (_, rows), m in zip(counts, matrices, strict=True)) <= _GATHERED:
        found = _kth_smallest_of_gathered(matrices, counts, ranks)
    else:
        found = _kth_smallest_over_ranks(flats, wanted, ranks)
    masks = []
    for matrix, flat, (threshold, wanted_ties, ties) in zip(matrices, flats, found, strict=True):
        mask = flat < threshold
        if wanted_ties:
            equal = flat == threshold
            if wanted_ties < ties:
                # Either all ranks gather or none: wanted and present ties are counted over all ranks.
                per_rank = torch.cat(ranks.gather(equal.sum()[None]))
                equal &= equal.cumsum(0) <= wanted_ties - per_rank[: ranks.rank].sum()
            mask |= equal
        masks.append(mask.view_as(matrix))
    return masks


def _kth_smallest_of_gathered(
    matrices: Sequence[Tensor], counts: Sequence[tuple[int, int]], ranks: Ranks
) -> list[tuple[Tensor, int, int]]:
    """:func:`_kth_smallest` of scores spread over ranks, by one exchange of all scores. For few scores, latency dominates."""
    columns = [matrix.shape[1] for matrix in matrices]
    # Messages have equal sizes, ranks unequal numbers of rows. Infinity, never among the smallest, fills the rest.
    sizes = [rows * width for (_, rows), width in zip(counts, columns, strict=True)]
    message = torch.cat(
        [
            torch.nn.functional.pad(matrix.flatten(), (0, size - matrix.numel()), value=torch.inf)
            for matrix, size in zip(matrices, sizes, strict=True)
        ]
    )
    gathered = torch.stack(ranks.gather(message)).split(sizes, dim=1)
    return [_kth_smallest(part.reshape(-1), count) for part, (count, _) in zip(gathered, counts, strict=True)]


def _kth_smallest(flat: Tensor, count: int) -> tuple[Tensor, int, int]:
    """The ``count``-th smallest value, the number of equal values among the ``count`` smallest, and among all."""
    if count == 0:
        return flat.new_tensor(0.0), 0, 0
    if flat.device.type == "cpu":
        # Faster than torch.kthvalue.
        threshold = torch.as_tensor(np.partition(flat.detach().numpy(), count - 1)[count - 1])
    else:
        threshold = flat.sort().values[count - 1]
    return threshold, count - int((flat < threshold).sum()), int((flat == threshold).sum())


def _kth_smallest_over_ranks(
    flats: Sequence[Tensor], counts: Sequence[int], ranks: Ranks
) -> list[tuple[Tensor, int, int]]:
    """:func:`_kth_smallest` of each set of non-negative float32 values spread over ranks, exactly, by radix selection.

    Non-negative floats have the order of their bits read as integers. Histograms of 11, 11 and 10 bits, summed over ranks,
    find the value, for any number of values.
    """
    device = flats[0].device
    bins = 2**_RADIX_BITS
    candidates = [(flat + 0.0).view(torch.int32) for flat in flats]  # + 0.0 turns -0.0 into 0.0
    remaining, present, prefixes = list(counts), [0] * len(flats), [0] * len(flats)
    for shift in range(32 - 32 % _RADIX_BITS, -1, -_RADIX_BITS):
        digits = [(keys >> shift) & (bins - 1) for keys in candidates]
        histograms = torch.stack([torch.bincount(digit, minlength=bins) for digit in digits])
        ranks.sum_(histograms)
        cumulative = histograms.cumsum(1)
        chosen = (cumulative < torch.tensor(remaining, device=device)[:, None]).sum(1).clamp(max=bins - 1).tolist()
        for index, digit in enumerate(chosen):
            present[index] = int(histograms[index, digit])
            remaining[index] -= int(cumulative[index, digit]) - present[index]
            prefixes[index] |= digit << shift
            candidates[index] = candidates[index][digits[index] == digit]
    thresholds = torch.tensor(prefixes, dtype=torch.int32, device=device).view(torch.float32)
    return [
        (threshold, wanted, ties) if count else (threshold.new_tensor(0.0), 0, 0)
        for threshold, wanted, ties, count in zip(thresholds, remaining, present, counts, strict=True)
    ]
