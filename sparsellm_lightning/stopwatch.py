"""Where the time goes, and what was computed in it: seconds and floating-point operations by phase."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Stopwatch:
    """Adds up wall seconds by phase. A phase inside another takes its time away from the outer one.

    Args:
        device: waited for at every boundary if it works asynchronously (CUDA).
        on_phase: called with the name of a phase when it is entered and the one before was another.

    Attributes:
        seconds: by phase.
        work: floating-point operations by phase and dtype of the operands, as told by :func:`count` in the phase.
    """

    def __init__(self, device: torch.device | str = "cpu", on_phase: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.work: dict[str, Counter[torch.dtype]] = {}
        self.on_phase = on_phase
        self._device = torch.device(device)
        self._running: list[str] = []
        self._since = 0.0
        self._latest = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for ``name``."""
        self._switch()
        self._running.append(name)
        if name != self._latest and self.on_phase is not None:
            self.on_phase(name)
        self._latest = name
        outer = _counting.set((self, name))
        try:
            yield
        finally:
            _counting.reset(outer)
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_counting: ContextVar[tuple[Stopwatch, str] | None] = ContextVar("counting", default=None)


def count(operations: float, dtype: torch.dtype = torch.float32) -> None:
    """Add floating-point operations to the phase that is running, if any; a multiplication and an addition are two.

    Whoever multiplies matrices says so here, from their shapes. Elementwise work is not counted.
    """
    if (running := _counting.get()) is not None:
        stopwatch, phase = running
        stopwatch.work.setdefault(phase, Counter())[dtype] += operations  # type: ignore[assignment]


@torch.no_grad()
def gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.15) -> float:
    """FLOP/s of the fastest product of two (size, size) matrices, tried for some seconds.

    What the share of a run is measured against: what this machine's library reaches, not what its maker states.
    """
    a, b = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    watch = Stopwatch(device)
    while best == float("inf") or time.perf_counter() < end:
        watch.seconds.clear()
        with watch.phase("product"):
            a @ b
        best = min(best, watch.seconds["product"])
    return 2 * size**3 / best
