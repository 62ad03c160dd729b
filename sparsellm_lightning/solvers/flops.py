"""Counts of floating-point operations, reported by the code that multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

Listener = Callable[[float, torch.dtype], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def count(operations: float, dtype: torch.dtype = torch.float32) -> None:
    """Report operations of a matrix product to the current listener, if there is one.

    Args:
        operations: number of additions and multiplications. A product of (n, d) and (d, f) has ``2 n d f``.
        dtype: of the operands.
    """
    if (listener := _listener.get()) is not None:
        listener(operations, dtype)


@contextmanager
def counted_by(listener: Listener) -> Iterator[None]:
    """Send every :func:`count` inside this context to ``listener``."""
    outer = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(outer)
