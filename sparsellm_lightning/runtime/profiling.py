"""Seconds and floating-point operations of a run, by phase.

A profile is ambient: :class:`Profile` is opened once, and any code inside marks its phase with :func:`phase`, without being
handed the profile. Outside a profile :func:`phase` does nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from sparsellm_lightning.solvers import counted_by


class Profile:
    """Wall seconds and operations by phase. Time in an inner phase does not count for the outer one.

    Args:
        device: synchronised at every change of phase if it is a CUDA device.
        on_phase: called with the name of a phase when it begins and the phase before it had another name.

    Attributes:
        seconds: by phase.
        work: floating-point operations by phase and dtype of the operands, as solvers report them.
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
    def collecting(self) -> Iterator[Profile]:
        """Phases inside this context belong to this profile."""
        outer = _profile.set(self)
        try:
            with counted_by(self._count):
                yield self
        finally:
            _profile.reset(outer)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside belongs to ``name``."""
        self._switch()
        self._running.append(name)
        if name != self._latest and self.on_phase is not None:
            self.on_phase(name)
        self._latest = name
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _count(self, operations: float, dtype: torch.dtype) -> None:
        if self._running:
            self.work.setdefault(self._running[-1], Counter())[dtype] += operations  # type: ignore[assignment]

    def _switch(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_profile: ContextVar[Profile | None] = ContextVar("profile", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The time inside belongs to phase ``name`` of the current profile, if there is one."""
    profile = _profile.get()
    if profile is None:
        yield
    else:
        with profile.phase(name):
            yield


@torch.no_grad()
def gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.15) -> float:
    """FLOP/s of the fastest of several products of two square matrices, which grow to (size, size).

    The reference for a run's share of the peak: the speed that this machine's library reaches, not the maker's figure.

    Args:
        device: that computes.
        dtype: of the matrices.
        size: largest number of rows and columns. The first products have fewer, because a CPU without bfloat16 would take a
            minute for the largest.
        seconds: time after which no further product begins.
    """
    profile, fastest, rows = Profile(device), 0.0, min(256, size)
    end = time.perf_counter() + seconds
    while not fastest or time.perf_counter() < end:
        a, b = (torch.full((rows, rows), 0.5, dtype=dtype, device=device) for _ in range(2))
        profile.seconds.clear()
        with profile.phase("product"):
            a @ b
        fastest = max(fastest, 2 * rows**3 / profile.seconds["product"])
        rows = min(2 * rows, size)
    return fastest
