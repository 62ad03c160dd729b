"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.solvers import Ranks


class ThreadRanks(Ranks):
    """A rank that is a thread of this process. All ranks meet at a barrier to exchange tensors."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.slots, self.barrier = rank, len(slots), slots, barrier

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self.slots[self.rank] = tensor.clone()
        self.barrier.wait()
        parts = [part.clone() for part in self.slots]
        self.barrier.wait()
        return parts

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.gather(tensor)).sum(0))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        parts = self._exchange(tensor)
        assert {(part.shape, part.dtype) for part in parts} == {(tensor.shape, tensor.dtype)}
        return parts

    def gather_rows(self, local: Tensor, rows: int) -> Tensor:
        parts = self._exchange(local)
        whole = torch.cat(parts)
        assert len(whole) == rows
        assert torch.equal(whole[self.local_rows(rows)], local)
        return whole


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Call ``work(ranks)`` on every rank at once. Returns the results in rank order."""
    barrier, slots, results, failures = threading.Barrier(size, timeout=300), [None] * size, [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, slots, barrier))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert not barrier.broken
    return results
