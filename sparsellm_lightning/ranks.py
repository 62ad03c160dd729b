"""What the solver needs from the other processes: sums over ranks, and rows of a matrix split over ranks.

The statistics are sums over tokens, so data-parallel ranks only ever add them up; rows of a weight are independent given
the statistics, so each rank solves its own. :class:`Ranks` is the single process, where both are trivial;
:class:`ProcessGroupRanks` is a ``torch.distributed`` group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def split_sizes(rows: int, ranks: int) -> list[int]:
    """Rows held by each rank: the split of ``torch.chunk`` and of FSDP along dimension 0; last ranks may hold none."""
    per_rank = -(-rows // ranks)
    return [max(0, min(per_rank, rows - rank * per_rank)) for rank in range(ranks)]


class Ranks:
    """A single process: it holds every row, and its sums are already complete."""

    rank: int = 0
    size: int = 1

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor over all ranks, in place. Every rank gets bit-equal values."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks (equal shapes), in rank order."""
        return [tensor]

    def gather_rows(self, local: Tensor, rows: int) -> Tensor:
        """All ``rows`` of a matrix of which each rank holds :func:`split_sizes` consecutive rows."""
        return local

    def local_rows(self, rows: int) -> slice:
        """This rank's rows of a matrix with ``rows`` rows."""
        start = self.rank * -(-rows // self.size)
        return slice(min(start, rows), min(start + split_sizes(rows, self.size)[self.rank], rows))


class ProcessGroupRanks(Ranks):
    """The ranks of a data-parallel process group.

    Args:
        group: the process group; ``None`` is the default (world) group.

    ``elements`` counts what this rank has put on the wire, so that tests can bound the communication.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.elements = 0

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.elements += tensor.numel()
            dist.all_reduce(tensor, group=self.group)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.elements += tensor.numel() * self.size
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def gather_rows(self, local: Tensor, rows: int) -> Tensor:
        sizes = split_sizes(rows, self.size)
        # Collectives want equal shapes: the short shards travel padded to the longest one.
        padded = local.new_zeros((sizes[0], *local.shape[1:]))
        padded[: local.shape[0]] = local
        parts = self.gather(padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


SINGLE = Ranks()
