"""The progress of pruning, block by block."""

from __future__ import annotations

import math
import sys
import time

import torch
from tqdm.auto import tqdm

from sparsellm_lightning.runtime import draws_bars, format_bytes, peak_memory

SECONDS_A_DRAW = 0.5  # shortest time between two drawings in one phase. A new phase is drawn at once


class Progress:
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
