"""SIGTERM while a model is pruned."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM inside this context raises ``SIGTERMException``. Lightning's own handler waits for the end of a training batch.

    Outside the main thread, where Python runs no signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SIGTERMException(128 + signum)
