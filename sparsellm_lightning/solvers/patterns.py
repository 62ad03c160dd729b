"""Sparsity patterns: from one score per weight to the mask of kept weights.

A solver calls a pattern with a matrix of scores and gets a bool mask, ``True`` = kept. The pattern also knows the ranks that
hold the other rows of the matrix. The threshold over the whole matrix is exact for any number of ranks.

N:M patterns are written **kept:group**: ``2:4`` keeps 2 of every 4 consecutive weights of a row, ``1:4`` keeps 1 of 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sparsellm_lightning.solvers.ranks import SINGLE, Ranks

_RADIX_BITS = 11  # 32 bits in three steps
_COMPARED = 8  # largest group whose entries are compared pair by pair, which is faster on a CPU than sorting
_GATHERED = 2**20  # largest number of scores, over all ranks, that are exchanged instead of counted

Counted = tuple[Tensor, int, int]
"""(scores of this rank's rows, number of scores to prune over all ranks, largest number of rows on any rank)."""


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

    def counted(self, scores: Tensor, first_column: int) -> Counted:
        """Input of the search for one threshold over all these scores, see :data:`Counted`. Only if ``group`` is 1."""
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
            return ~_smallest_of_rows(scores, self._row_counts(scores))
        return ~_smallest([self.counted(scores, first_column)], self.ranks)[0]

    def counted(self, scores: Tensor, first_column: int) -> Counted:
        pruned, _, largest = self._counts(scores)
        return scores, pruned, largest

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        return replace(self, rows=None, first_row=None)

    def _row_counts(self, scores: Tensor) -> Tensor:
        """Number of entries to prune in each of these rows. Rows differ by one at most, so that the sum over all is exact."""
        pruned, rows, _ = self._counts(scores)
        first = self.ranks.local_rows(rows).start if self.first_row is None else self.first_row
        ends = torch.arange(first, first + scores.shape[0] + 1, device=scores.device) * pruned // max(rows, 1)
        return ends.diff()

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
        if self.group <= _COMPARED:
            by_place = scores.reshape(-1, self.group).T.contiguous()
            return (_number_ahead(by_place) < self.kept).T.reshape(scores.shape)
        grouped = scores.reshape(-1, self.group)
        order = grouped.argsort(dim=1, descending=True, stable=True)[:, : self.kept]
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


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
        together = list(zip(self.patterns, parts, strict=True))
        if not per_row and self.group == 1:
            counted = [pattern.counted(part, first_column) for pattern, part in together]
            return ~torch.cat(_smallest(counted, self.ranks))
        chosen = [pattern.select(part, per_row=per_row, first_column=first_column) for pattern, part in together]
        return torch.cat(chosen)

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        starts = accumulate(self.rows, initial=0)
        own = [part - start for part, start in zip(rows.split(list(counts)), starts, strict=False)]
        return Stacked([p.of_rows(part, [len(part)]) for p, part in zip(self.patterns, own, strict=True)], counts)


@dataclass(frozen=True)
class Containing(Pattern):
    """A pattern that prunes the given entries first, then further entries until ``pattern``'s sparsity is reached.

    Every column block or row with a mask decision of its own loses the same share of its entries that are not given. If more
    entries are given than ``pattern`` prunes, all given entries are pruned, and no others.

    Args:
        pattern: decides how many entries are pruned, and how they are grouped.
        pruned: (rows, columns of the whole matrix) bool, True = given; this rank's rows.
        share: fraction to prune of the entries that are not given. None: computed over all ranks (N:M does not use it).
    """

    pattern: Pattern
    pruned: Tensor
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is None and isinstance(self.pattern, Unstructured):
            given, entries = self.ranks.total(int(self.pruned.sum()), self.pruned.numel())
            wanted = max(round(self.pattern.sparsity * entries) - given, 0)
            object.__setattr__(self, "share", wanted / max(entries - given, 1))

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.pattern.group

    @property
    def ranks(self) -> Ranks:  # type: ignore[override]
        return self.pattern.ranks

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        given = self._given(scores, first_column)
        if self.share is None:
            return self.pattern.select(_given_first(scores, given)) & ~given
        if per_row:
            return ~_smallest_of_rows(_given_first(scores, given), self._row_counts(given, self.share))
        return ~_smallest([self.counted(scores, first_column)], self.ranks)[0]

    def counted(self, scores: Tensor, first_column: int) -> Counted:
        assert self.share is not None
        given = self._given(scores, first_column)
        pruned, entries = self.ranks.total(int(given.sum()), given.numel())
        _, _, largest = self.pattern.counted(scores, first_column)
        return _given_first(scores, given), pruned + round(self.share * (entries - pruned)), largest

    def of_rows(self, rows: Tensor, counts: Sequence[int]) -> Pattern:
        return Containing(self.pattern.of_rows(rows, counts), self.pruned[rows], self.share)

    def _given(self, scores: Tensor, first_column: int) -> Tensor:
        return self.pruned[:, first_column : first_column + scores.shape[1]]

    def _row_counts(self, given: Tensor, share: float) -> Tensor:
        """Number of entries to prune in each row: those given, and the share of the others, exact in the sum over rows."""
        free = (~given).sum(1)
        before = sum(rows for (rows,) in self.ranks.gather_counts(int(free.sum()))[: self.ranks.rank])
        ends = torch.nn.functional.pad(free.cumsum(0), (1, 0)) + before
        return given.sum(1) + (ends.double() * share).round().long().diff()


def _number_ahead(scores: Tensor) -> Tensor:
    """How many of each column's other entries are larger, or equal and above, (places, columns) uint8."""
    ahead = torch.zeros_like(scores, dtype=torch.uint8)
    for lower in range(len(scores)):
        for upper in range(lower):
            upper_is_ahead = scores[upper] >= scores[lower]
            ahead[lower] += upper_is_ahead
            ahead[upper] += ~upper_is_ahead
    return ahead


def _given_first(scores: Tensor, given: Tensor) -> Tensor:
    """Scores of which those of given entries are the smallest."""
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).masked_fill_(given, 0)


def _smallest_of_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """The mask of the ``counts`` smallest scores of each row. Of equal scores the left ones are taken, on every backend."""
    order = scores.argsort(dim=1, stable=True)
    smallest = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(smallest).scatter_(1, order, smallest)


def _smallest(counted: Sequence[Counted], ranks: Ranks) -> list[Tensor]:
    """For each matrix, the mask of its ``count`` smallest scores over all ranks.

    Equal scores are taken in row order, lower ranks first. The matrices share every message between ranks.

    Args:
        counted: of each matrix.
        ranks: hold the other rows.
    """
    if ranks.size == 1:
        return [_smallest_here(scores.flatten(), count).view_as(scores) for scores, count, _ in counted]
    if ranks.size * sum(scores.shape[1] * rows for scores, _, rows in counted) <= _GATHERED:
        return _smallest_of_gathered(counted, ranks)
    flats = [scores.flatten() for scores, _, _ in counted]
    found = _kth_smallest_over_ranks(flats, [count for _, count, _ in counted], ranks)
    masks = []
    for (scores, _, _), flat, (threshold, wanted_ties, ties) in zip(counted, flats, found, strict=True):
        mask = flat < threshold
        if wanted_ties:
            equal = flat == threshold
            if wanted_ties < ties:
                # Either all ranks gather or none: wanted and present ties are counted over all ranks.
                per_rank = torch.cat(ranks.gather(equal.sum()[None]))
                equal &= equal.cumsum(0) <= wanted_ties - per_rank[: ranks.rank].sum()
            mask |= equal
        masks.append(mask.view_as(scores))
    return masks


def _smallest_here(flat: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` smallest values, ties by position. NaN, which fills gaps, is never among them."""
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    if flat.device.type == "cpu":
        # Faster than torch.kthvalue.
        threshold = torch.as_tensor(np.partition(flat.detach().numpy(), count - 1)[count - 1])
    else:
        threshold = flat.sort().values[count - 1]
    below, equal = flat < threshold, flat == threshold
    fewer, ties = torch.stack([below.sum(), equal.sum()]).tolist()
    if fewer + ties > count:
        equal &= equal.cumsum(0) <= count - fewer
    return below | equal


def _smallest_of_gathered(counted: Sequence[Counted], ranks: Ranks) -> list[Tensor]:
    """:func:`_smallest` by one exchange of all scores. For few scores, latency dominates."""
    # Messages have equal sizes, ranks unequal numbers of rows.
    sizes = [rows * scores.shape[1] for scores, _, rows in counted]
    message = torch.cat(
        [
            torch.nn.functional.pad(scores.flatten(), (0, size - scores.numel()), value=torch.nan)
            for (scores, _, _), size in zip(counted, sizes, strict=True)
        ]
    )
    gathered = torch.stack(ranks.gather(message)).split(sizes, dim=1)
    masks = []
    for part, (scores, count, _) in zip(gathered, counted, strict=True):
        mine = _smallest_here(part.flatten(), count).view_as(part)[ranks.rank]
        masks.append(mine[: scores.numel()].view_as(scores))
    return masks


def _kth_smallest_over_ranks(
    flats: Sequence[Tensor], counts: Sequence[int], ranks: Ranks
) -> list[tuple[Tensor, int, int]]:
    """For each set of values: its count-th smallest value over all ranks, the number of ties to prune, and of all ties.

    Ties are values equal to the count-th smallest one. Both numbers are over all ranks.

    The values are non-negative float32, which have the order of their bits read as integers. Histograms of 11, 11 and 10 bits,
    summed over ranks, find the value exactly, for any number of values.
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
