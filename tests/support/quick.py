"""What takes longer than a tiny run, and most tests do not look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


@contextmanager
def constant_speed() -> Iterator[None]:
    """Every run takes a constant for the speed of large products, which it measures otherwise."""
    places = ("prune", "admission")
    patches = [mock.patch(f"sparsellm_lightning.pipeline.{place}.gemm_peak", return_value=1e12) for place in places]
    with patches[0], patches[1]:
        yield


@contextmanager
def without_drawing() -> Iterator[None]:
    """Figures are made, and their files are empty."""

    def savefig(self: Any, path: Path, **_: Any) -> None:
        Path(path).touch()

    with mock.patch("matplotlib.figure.Figure.savefig", savefig):
        yield
