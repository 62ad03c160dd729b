"""Speed and size of models as a table."""

from __future__ import annotations

from collections.abc import Sequence

from sparsellm_lightning.models import Speed
from sparsellm_lightning.reporting.report import format_table


def speed_table(speeds: Sequence[Speed]) -> str:
    """One row for each figure, one column for each model, and a column of ratios: the first model's figure over the last's.

    Ratios take the first model's speed with its fastest kernels, and the last one's with dense ones.
    """
    first = [speed for speed in speeds if speed.name == speeds[0].name][-1]
    last = next(speed for speed in speeds if speed.name == speeds[-1].name)
    rows: list[tuple[str, ...]] = [
        ("", *(s.name if s.kernels == "dense" else f"{s.name}, {s.kernels} kernels" for s in speeds)),
        ("parameters", *(f"{speed.parameters:,}" for speed in speeds)),
        ("zeros", *(f"{100 * speed.zeros / speed.parameters:.1f} %" for speed in speeds)),
        ("memory, MiB", *(f"{speed.memory_bytes / 2**20:.1f}" for speed in speeds)),
        ("file, MiB", *("-" if s.file_bytes is None else f"{s.file_bytes / 2**20:.1f}" for s in speeds)),
        ("load, seconds", *(f"{speed.median('load'):.3f}" for speed in speeds)),
        ("prefill, tokens/s", *(f"{speed.median('prefill'):.1f}" for speed in speeds)),
        ("decode, tokens/s", *(f"{speed.median('decode'):.1f}" for speed in speeds)),
    ]
    if len(speeds) == 1:
        return format_table(rows)
    ratios = [
        first.parameters / last.parameters,
        None,
        first.memory_bytes / last.memory_bytes,
        first.file_bytes / last.file_bytes if first.file_bytes and last.file_bytes else None,
        *(first.times(last, figure) for figure in ("load", "prefill", "decode")),
    ]
    shown = ["times", *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
    return format_table([(*row, ratio) for row, ratio in zip(rows, shown, strict=True)])
