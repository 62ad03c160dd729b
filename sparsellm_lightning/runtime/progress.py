"""Progress bars. Those of loops are ambient, like a profile: any loop inside :func:`showing` draws its own."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from sparsellm_lightning.runtime.memory import format_bytes, peak_memory

T = TypeVar("T")

SECONDS_A_DRAW = 0.5  # shortest time between two drawings in one phase. A new phase is drawn at once

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """Whether loops inside show their progress."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def draws_bars() -> bool:
    """Whether the output is a terminal or a notebook. A log file gets lines instead."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def tracked(items: Iterable[T], what: str, unit: str) -> Iterator[T]:
    """The items, with a bar and the time that is left. In a log file: a line when the last item is done.

    Args:
        items: of a loop.
        what: the loop does.
        unit: of the items.
    """
    shown, start = _shown.get(), time.monotonic()
    bar: Any = tqdm(items, desc=what, unit=unit, leave=False, disable=not (shown and draws_bars()))
    yield from bar
    if shown and not draws_bars():
        print(f"{what}: done in {time.monotonic() - start:.0f} s", file=sys.stderr)


class BlockProgress:
    """A bar over blocks, with the current phase, the last error and the peak memory. In a log file a line for each block.

    Args:
        blocks: number of blocks.
        device: that computes.
        shown: whether the progress is shown.
    """

    def __init__(self, blocks: int, device: torch.device, shown: bool) -> None:
        self.bar = tqdm(total=blocks, desc="Pruning", unit="block", disable=not (shown and draws_bars()))
        self._lines = shown and not draws_bars()
        self._blocks, self._done, self._start = blocks, 0, time.monotonic()
        self._device = device
        self._status: dict[str, str] = {}
        self._drawn: dict[str | None, float] = {}  # time of the last drawing, by phase

    def phase(self, name: str) -> None:
        """A phase begins."""
        self._show(phase=name)

    def error(self, error: float) -> None:
        """An error was measured."""
        self._show(error=f"{error:.4f}")

    def block(self) -> None:
        """A block is finished."""
        self.bar.update()
        self._done += 1
        if self._lines:
            seconds = time.monotonic() - self._start
            left = seconds / self._done * (self._blocks - self._done)
            error = f", error {self._status['error']}" if "error" in self._status else ""
            print(
                f"Pruning: block {self._done} of {self._blocks}{error}, {seconds:.0f} s, {left:.0f} s left",
                file=sys.stderr,
            )

    def _show(self, **news: str) -> None:
        self._status.update(news)
        phase, now = self._status.get("phase"), time.monotonic()
        if not self.bar.disable and now - self._drawn.get(phase, -math.inf) >= SECONDS_A_DRAW:
            self._drawn[phase] = now
            peak = peak_memory(self._device)
            self.bar.set_postfix(self._status, **({} if peak is None else {"memory": format_bytes(peak)}))
