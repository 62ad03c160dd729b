"""Plots of a report; importing this module needs the ``plots`` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from sparsellm_lightning.report import PruningReport


def save_plots(report: PruningReport, folder: Path) -> list[Path]:
    """Write ``error_per_iteration.png`` and ``layers.png``: returns their paths."""
    title = f"{report.model}, {report.method}, {100 * report.sparsity['achieved']:.1f} % zeros"

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    iterations = max((len(block["errors"]) for block in report.blocks), default=0)
    for iteration in range(iterations):
        blocks = [block for block in report.blocks if len(block["errors"]) > iteration]
        axes.plot(
            [block["index"] for block in blocks],
            [block["errors"][iteration] for block in blocks],
            marker="o",
            markersize=3,
            label="local solver" if iteration == 0 else f"iteration {iteration + 1}",
        )
    axes.set(xlabel="block", ylabel="relative error of the feed-forward output", title=title, yscale="log")
    if iterations:
        axes.legend()
    error_path = folder / "error_per_iteration.png"
    figure.savefig(error_path, dpi=120)

    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, float, float | None]]] = {}
    per_block = len(report.layers) // max(len(report.blocks), 1)
    for position, layer in enumerate(report.layers):
        kind = layer["name"].rsplit(".", 1)[-1]
        kinds.setdefault(kind, []).append((position // max(per_block, 1), layer["sparsity"], layer["error"]))
    for kind, points in kinds.items():
        top.plot([p[0] for p in points], [100 * p[1] for p in points], marker=".", label=kind)
        with_error = [(p[0], p[2]) for p in points if p[2] is not None]
        bottom.plot([p[0] for p in with_error], [p[1] for p in with_error], marker=".", label=kind)
    top.set(ylabel="zeros (%)", title=title, ylim=(-2, 102))
    bottom.set(xlabel="block", ylabel="relative output error", yscale="log")
    if kinds:
        bottom.legend(ncols=len(kinds), fontsize="small")
    layers_path = folder / "layers.png"
    figure.savefig(layers_path, dpi=120)
    return [error_path, layers_path]
