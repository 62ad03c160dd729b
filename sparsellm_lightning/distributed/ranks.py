"""The ranks of a ``torch.distributed`` process group."""

from __future__ import annotations

import itertools
import logging
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from sparsellm_lightning.distributed.liveness import FAILURE, watching_peers
from sparsellm_lightning.solvers import Ranks

log = logging.getLogger(__name__)

_HEARD = "heard"  # key of the store: number of ranks that have read the failure
_CONTEXTS = itertools.count()  # equal on all ranks, which enter the same contexts in the same order
_SMALL = 2**15  # largest number of elements, over all ranks, that are gathered and added rather than reduced
_PATIENCE = 10.0  # seconds that a failing rank waits for the others to read its message


def ranks_on_this_host(ranks: Ranks) -> int:
    """Number of ranks that share this machine's memory. All ranks call this together."""
    host = zlib.crc32(socket.gethostname().encode())
    return ranks.gather_counts(host).count([host])


class PeerError(RuntimeError):
    """Another rank failed in the work that this one shared. The message is that rank's."""


class ProcessGroupRanks(Ranks):
    """The ranks of a data-parallel process group.

    Args:
        group: the process group. None: the default (world) group.
        device: where tensors lie that travel between ranks.

    Attributes:
        elements: number of elements that :meth:`sum_` and :meth:`gather` have sent, so that tests can bound the communication.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.device = torch.device(device)
        self.elements = 0

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if tensor.numel() * self.size <= _SMALL:
                # One exchange instead of the two of a reduction, because small messages cost latency.
                tensor.copy_(torch.stack(self.gather(tensor)).sum(0))
            else:
                self.elements += tensor.numel()
                dist.all_reduce(tensor, group=self.group)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [*self._gathered(tensor.contiguous())]

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks in one, (ranks, ...)."""
        self.elements += tensor.numel() * self.size
        whole = tensor.new_empty((self.size, *tensor.shape))
        dist.all_gather([*whole], tensor, group=self.group)
        return whole

    def gather_rows(self, local: Tensor, rows: int) -> Tensor:
        # Only the last ranks have fewer rows than others, so that all padding is at the end.
        return self._gathered(self._padded(local, rows)).flatten(0, 1)[:rows]

    def gather_rows_to_first(self, local: Tensor, rows: int) -> Tensor | None:
        padded = self._padded(local, rows)
        whole = padded.new_empty((self.size, *padded.shape)) if self.rank == 0 else None
        dist.gather(padded, None if whole is None else [*whole], group=self.group, group_dst=0)
        return None if whole is None else whole.flatten(0, 1)[:rows]

    def _padded(self, local: Tensor, rows: int) -> Tensor:
        """The local rows, padded to the length of the longest shard: collectives need equal shapes."""
        longest = -(-rows // self.size)
        if len(local) == longest:
            return local.contiguous()
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: local.shape[0]] = local
        return padded

    @contextmanager
    def failing_together(self, what: str = "Pruning") -> Iterator[None]:
        default = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        store = PrefixStore(f"sparsellm_lightning/{next(_CONTEXTS)}", default)
        try:
            with watching_peers(store, self.rank, self.size, what):
                yield
        except BaseException as error:
            if store.check([FAILURE]):
                store.add(_HEARD, 1)
                if not isinstance(error, Exception):
                    raise  # all ranks are interrupted
                # Another rank failed first and closed its connections. That caused the error here.
                message = store.get(FAILURE).decode()
                log.error(message)
                raise PeerError(message) from error
            message = f"{what} failed on rank {self.rank}: {type(error).__name__}: {error}"
            log.error(message)
            store.set(FAILURE, message)
            # Closing the connections wakes ranks that wait in a collective, but NCCL would wait for them: there their watchers
            # end them. They then need time to read the message, because the store may live in this process.
            if "nccl" not in dist.get_backend(self.group):  # or cpu:gloo,cuda:nccl
                dist.destroy_process_group()
            deadline = time.monotonic() + _PATIENCE
            with suppress(RuntimeError):  # the process that serves the store has ended
                while store.add(_HEARD, 0) < self.size - 1 and time.monotonic() < deadline:
                    time.sleep(0.05)
            raise
