"""Ending a process whose peers have stopped or failed, because its main thread may wait for them in a collective for ever."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store  # type: ignore[attr-defined]

log = logging.getLogger(__name__)

FAILURE = "failure"  # key of the store: message of the rank that failed first
BEAT = 2.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without a sign of life after which a rank counts as stopped
ARRIVAL = 600.0  # the same before its first sign: it may still tokenise, or wait for a logger's server
GRACE = 10.0  # seconds after another rank's failure in which this one may still end by an exception


@contextmanager
def watching_peers(store: Store, rank: int, size: int, what: str = "Pruning") -> Iterator[None]:
    """End this process if another rank inside this context stops or fails.

    A thread counts up this rank's key in the store and reads the key of the next rank only, so that the store's load grows in
    proportion to the number of ranks. If the next rank's key has not changed for :data:`SILENCE` seconds (:data:`ARRIVAL`
    before its first change), this rank writes a failure into the store and exits. A rank that reads a failure and has not ended
    :data:`GRACE` seconds later exits with status 1, because a main thread that waits in a collective cannot be interrupted
    otherwise. The first rank that leaves the context without an exception ends the watch on all ranks. That is safe, because no
    rank waits for another after the last collective inside the context.

    Args:
        store: shared by all ranks. Its keys must be this context's own.
        rank, size: of this process, and number of processes.
        what: goes on inside this context, for messages.
    """
    # A clone has a connection of its own, which does not wait for the main thread's operations. Older torch has no clones.
    own = store.clone() if hasattr(store, "clone") else store
    watch = _Watch(own, rank, (rank + 1) % size, what)
    own.add(str(rank), 1)  # it has come, should it stop before its first round
    threads = [threading.Thread(target=run, daemon=True) for run in (watch.beat, watch.judge)]
    for thread in threads:
        thread.start()
    try:
        yield
        watch.succeeded = True
    finally:
        watch.left.set()
        for thread in threads:
            thread.join(BEAT)


class _Watch:
    def __init__(self, store: Store, rank: int, neighbour: int, what: str) -> None:
        self.store, self.rank, self.neighbour, self.what = store, rank, neighbour, what
        self.count = 0  # of the neighbour's signs of life
        # When the neighbour's count last rose, and when the store last answered.
        self.heard = self.answered = time.monotonic()
        self.failure: tuple[str, float] | None = None  # message and time
        self.left = threading.Event()
        self.succeeded = self.over = False

    def beat(self) -> None:
        """Exchange signs of life through the store, until this or another rank leaves."""
        leaving = False
        while not (self.over or leaving):
            leaving = self.left.wait(BEAT)  # one more round follows, which tells the others
            try:
                self.store.add(str(self.rank), 1)
                self.over = self.store.add("left", int(self.succeeded)) > 0
                count = self.store.add(str(self.neighbour), 0)
                if self.failure is None and self.store.check([FAILURE]):
                    self.failure = self.store.get(FAILURE).decode(), time.monotonic()
            except (RuntimeError, OSError):
                return  # the process that serves the store has ended; the store counts as silent from now on
            self.answered = time.monotonic()
            if count > self.count:
                self.count, self.heard = count, self.answered

    def judge(self) -> None:
        """Exit when the neighbour or the store has been silent for too long, or another rank has failed."""
        before = time.monotonic()
        while not (self.over or self.left.wait(BEAT / 4)):
            now = time.monotonic()
            if now - before > SILENCE / 2:  # this process itself was suspended, as the others may have been
                self.heard = self.answered = now
            before = now
            if self.failure is not None and now - self.failure[1] > GRACE:
                self._exit(self.failure[0])
            if now - self.answered > SILENCE:
                self._exit(
                    _stopped(self.what, "the process that serves the process group's store, mostly rank 0,", SILENCE)
                )
            patience = SILENCE if self.count else ARRIVAL
            if now - self.heard > patience:
                message = _stopped(self.what, f"rank {self.neighbour}", patience)
                threading.Thread(target=self.store.set, args=(FAILURE, message), daemon=True).start()
                time.sleep(BEAT / 4)
                self._exit(message)

    def _exit(self, message: str) -> None:
        log.error(message)
        logging.shutdown()
        os._exit(1)


def _stopped(what: str, who: str, seconds: float) -> str:
    kept = " If resume_dir is set, finished blocks are in it: start the same command again to go on." * (
        what == "Pruning"
    )
    return f"{what} failed: {who} has given no sign of life for {seconds:.0f} seconds.{kept}"
