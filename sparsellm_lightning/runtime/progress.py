"""Progress bars. Like a profile they are ambient: :func:`showing` is opened once, and any loop inside shows how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

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
