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

import numpy as np
import torch
from torch import Tensor

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.ranks import SINGLE, Ranks

_RADIX_BITS = 11  # 32 bits in three steps
_GATHERED = 2**20  # scores over all ranks up to which they are exchanged themselves


class Pattern:
    """Base of the patterns.

    ``group`` is the number of consecutive columns that must be decided together (1 = any), ``ranks`` those over which the
    rows of the matrix are spread.
    """

    group: int = 1
    ranks: Ranks = SINGLE

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        """Mask (True = kept) of the highest scores.

        Args:
            scores: non-negative float32, (rows, columns); this rank's rows.
            first_column: where these columns begin in the whole matrix, for patterns that differ by place.
            per_row: keep the same number in every row, rather than one threshold for the matrix. N:M patterns are always
                per row and ignore it.

        Returns:
            bool, the shape of ``scores``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Unstructured(Pattern):
    """The fraction ``sparsity`` of all weights, anywhere. Exactly ``round(sparsity * n)`` are pruned, ties by position.

    Args:
        sparsity: in [0, 1).
        ranks: over which the rows of the matrix are spread.
        rows: of the whole matrix, over all ranks; counted when None.
    """

    sparsity: float
    ranks: Ranks = SINGLE
    rows: int | None = None

    def select(self, scores: Tensor, *, per_row: bool = False, first_column: int = 0) -> Tensor:
        if per_row:
            pruned = round(self.sparsity * scores.shape[1])
            mask = torch.ones_like(scores, dtype=torch.bool)
            # Stable sort: equal scores are pruned from the left, whatever the backend.
            order = scores.argsort(dim=1, stable=True)[:, :pruned]
            return mask.scatter_(1, order, False)
        return ~_smallest([scores], [self.count(scores)], self.ranks)[0]

    def count(self, scores: Tensor) -> tuple[int, int]:
        """How many of these scores to prune, and how many rows there are, over all ranks."""
        rows = torch.tensor([scores.shape[0]], device=scores.device)
        if self.rows is None:
            self.ranks.sum_(rows)
        all_rows = self.rows or int(rows)
        return round(self.sparsity * all_rows * scores.shape[1]), all_rows


@dataclass(frozen=True)
class NofM(Pattern):
    """Keep the ``kept`` highest of every ``group`` consecutive weights of a row."""

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
    """Several matrices with the same columns, stacked by rows: each is selected on its own.

    Lets q/k/v, or gate and up, go through one solver loop while thresholds stay per matrix. ``rows`` are this rank's.
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


@dataclass(frozen=True)
class Containing(Pattern):
    """Another pattern whose pruned weights include given ones.

    Where more are given than the pattern would prune, all of them are pruned.

    Args:
        pattern: how many to prune, and how they are grouped.
        pruned: (rows, columns of the whole matrix) bool; this rank's rows.
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


def _smallest(matrices: Sequence[Tensor], counts: Sequence[tuple[int, int]], ranks: Ranks) -> list[Tensor]:
    """For each matrix, the mask of exactly ``count`` smallest scores over all ranks.

    Equal scores are taken in row order, lower ranks first. The matrices share every message between ranks.

    Args:
        matrices: this rank's rows of each.
        counts: of each, how many to take, and its rows over all ranks.
        ranks: over which the rows are spread.
    """
    flats = [matrix.contiguous().view(-1) for matrix in matrices]
    wanted = [count for count, _ in counts]
    if ranks.size == 1:
        found = [_kth_smallest(flat, count) for flat, count in zip(flats, wanted, strict=True)]
    elif sum(rows * matrix.shape[1] for (_, rows), matrix in zip(counts, matrices, strict=True)) <= _GATHERED:
        found = _kth_smallest_of_gathered(matrices, counts, ranks)
    else:
        found = _kth_smallest_over_ranks(flats, wanted, ranks)
    masks = []
    for matrix, flat, (threshold, wanted_ties, ties) in zip(matrices, flats, found, strict=True):
        mask = flat < threshold
        if wanted_ties:
            equal = flat == threshold
            if wanted_ties < ties:
                # Every rank takes part, or none: wanted and present ties are counted over all ranks.
                per_rank = torch.cat(ranks.gather(equal.sum()[None]))
                equal &= equal.cumsum(0) <= wanted_ties - per_rank[: ranks.rank].sum()
            mask |= equal
        masks.append(mask.view_as(matrix))
    return masks


def _kth_smallest_of_gathered(
    matrices: Sequence[Tensor], counts: Sequence[tuple[int, int]], ranks: Ranks
) -> list[tuple[Tensor, int, int]]:
    """:func:`_kth_smallest` of scores spread over ranks, by one exchange of all of them: for few, latency is what costs."""
    columns = [matrix.shape[1] for matrix in matrices]
    # Ranks have unequal numbers of rows, and messages equal sizes: filled up with what is never among the smallest.
    sizes = [-(-rows // ranks.size) * width for (_, rows), width in zip(counts, columns, strict=True)]
    message = torch.cat(
        [
            torch.nn.functional.pad(matrix.flatten(), (0, size - matrix.numel()), value=torch.inf)
            for matrix, size in zip(matrices, sizes, strict=True)
        ]
    )
    gathered = torch.stack(ranks.gather(message)).split(sizes, dim=1)
    return [_kth_smallest(part.reshape(-1), count) for part, (count, _) in zip(gathered, counts, strict=True)]


def _kth_smallest(flat: Tensor, count: int) -> tuple[Tensor, int, int]:
    """The ``count``-th smallest value, how many equal to it are among the ``count`` smallest, and how many there are."""
    if count == 0:
        return flat.new_tensor(0.0), 0, 0
    if flat.device.type == "cpu":
        # Ten to fifty times as fast as torch's own.
        threshold = torch.as_tensor(np.partition(flat.detach().numpy(), count - 1)[count - 1])
    else:
        threshold = flat.sort().values[count - 1]
    return threshold, count - int((flat < threshold).sum()), int((flat == threshold).sum())


def _kth_smallest_over_ranks(
    flats: Sequence[Tensor], counts: Sequence[int], ranks: Ranks
) -> list[tuple[Tensor, int, int]]:
    """:func:`_kth_smallest` of each set of non-negative float32 values spread over ranks, exactly, by radix selection.

    The bits of a non-negative float order as integers do, so counting some bits at a time finds the value in three
    all-reduced histograms, however many values there are.
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
