"""What the solver needs from the other processes: sums over ranks, and rows of a matrix split over ranks.

The statistics are sums over tokens, so data-parallel ranks only ever add them up; rows of a weight are independent given
the statistics, so each rank solves its own. :class:`Ranks` is the single process, where both are trivial;
:class:`ProcessGroupRanks` is a ``torch.distributed`` group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

_FAILURE, _HEARD = "sparsellm_lightning/failure", "sparsellm_lightning/heard"
_SMALL = 2**15  # elements over all ranks
_PATIENCE = 10.0  # seconds that a failing rank waits for the others to hear of it


class PeerError(RuntimeError):
    """Another rank failed while this one was pruning; the message is that rank's."""


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

    def gather_rows_to_first(self, local: Tensor, rows: int) -> Tensor | None:
        """Like :meth:`gather_rows`, on rank 0 only; None elsewhere."""
        return local

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Whatever is raised inside on one rank ends the others too, with its message, rather than leave them waiting."""
        yield

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
            if tensor.numel() * self.size <= _SMALL:
                # One exchange instead of the two of a reduction: for counts it is the latency that costs.
                tensor.copy_(torch.stack(self.gather(tensor)).sum(0))
            else:
                self.elements += tensor.numel()
                dist.all_reduce(tensor, group=self.group)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.elements += tensor.numel() * self.size
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def gather_rows(self, local: Tensor, rows: int) -> Tensor:
        return self._join(self.gather(self._padded(local, rows)), rows)

    def gather_rows_to_first(self, local: Tensor, rows: int) -> Tensor | None:
        padded = self._padded(local, rows)
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts, group=self.group, group_dst=0)
        return None if parts is None else self._join(parts, rows)

    def _padded(self, local: Tensor, rows: int) -> Tensor:
        """Collectives want equal shapes: the short shards travel padded to the longest one."""
        padded = local.new_zeros((split_sizes(rows, self.size)[0], *local.shape[1:]))
        padded[: local.shape[0]] = local
        return padded

    def _join(self, parts: list[Tensor], rows: int) -> Tensor:
        return torch.cat([part[:size] for part, size in zip(parts, split_sizes(rows, self.size), strict=True)])

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        try:
            yield
        except BaseException as error:
            if store.check([_FAILURE]):
                # Another rank failed first; what happened here is only its echo.
                message = store.get(_FAILURE).decode()
                log.error(message)
                store.add(_HEARD, 1)
                raise PeerError(message) from error
            message = f"Pruning failed on rank {self.rank}: {type(error).__name__}: {error}"
            log.error(message)
            store.set(_FAILURE, message)
            # Closing the connections wakes the ranks that wait in a collective; then let them read the message, since
            # the store may live in this process.
            dist.destroy_process_group()
            deadline = time.monotonic() + _PATIENCE
            while store.add(_HEARD, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            raise


SINGLE = Ranks()
