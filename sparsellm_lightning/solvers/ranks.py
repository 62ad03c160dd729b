"""The processes that share a matrix: what a solver needs from them, and the single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Ranks:
    """A single process. It holds every row, and its sums are complete.

    Statistics are sums over tokens, so data-parallel ranks add them up. Rows of a weight are independent given the statistics,
    so each rank solves its own. :class:`~sparsellm_lightning.distributed.ProcessGroupRanks` overrides :meth:`sum_`,
    :meth:`gather` and the methods built on them.

    Attributes:
        rank: index of this process.
        size: number of processes.
        device: where tensors must lie that travel between ranks (NCCL refuses CPU tensors).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor over all ranks, in place. Every rank gets bit-equal values."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks (equal shapes), in rank order."""
        return [tensor]

    def gather_rows(self, local: Tensor, rows: int) -> Tensor:
        """All ``rows`` of a matrix of which each rank holds its :meth:`local_rows`."""
        return local

    def gather_rows_to_first(self, local: Tensor, rows: int) -> Tensor | None:
        """Like :meth:`gather_rows` on rank 0; None on the other ranks."""
        return local

    def gather_counts(self, *counts: int) -> list[list[int]]:
        """The integers of all ranks (equally many on each), in rank order."""
        mine = torch.tensor(counts, dtype=torch.int64, device=self.device)
        found: list[list[int]] = torch.stack(self.gather(mine)).tolist()
        return found

    def total(self, *counts: int) -> list[int]:
        """The sum of each integer over all ranks."""
        return [sum(column) for column in zip(*self.gather_counts(*counts), strict=True)]

    def largest(self, count: int) -> int:
        """The largest of the ranks' integers."""
        return max(found for (found,) in self.gather_counts(count))

    def all(self, condition: bool) -> bool:
        """Whether the condition holds on every rank. Also a barrier: no rank leaves before all have arrived."""
        return self.total(int(condition)) == [self.size]

    @contextmanager
    def failing_together(self, what: str = "Pruning") -> Iterator[None]:
        """An exception inside ends the other ranks too, with its message, instead of leaving them in a collective.

        The process group may be closed then. ``what`` goes on inside, for messages.
        """
        yield

    def local_rows(self, rows: int) -> slice:
        """This rank's rows of a matrix with ``rows`` rows: as ``torch.chunk`` and FSDP split them. Last ranks may hold none."""
        per_rank = -(-rows // self.size)
        return slice(min(self.rank * per_rank, rows), min((self.rank + 1) * per_rank, rows))


SINGLE = Ranks()
