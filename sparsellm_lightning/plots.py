"""Plots of a report; importing this module needs the ``plots`` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from sparsellm_lightning.report import PruningReport


def save_plots(report: PruningReport, folder: Path) -> list[Path]:
    """Write ``layers.png``, and ``error_per_iteration.png`` where there are iterations: returns their paths."""
    title = f"{report.model}, {report.method}, {100 * report.sparsity['achieved']:.1f} % zeros"

    paths = [_plot_iterations(report, title, folder)] if any(block["errors"] for block in report.blocks) else []

    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, float, float | None]]] = {}
    for layer in report.layers:
        kind = layer["name"].rsplit(".", 1)[-1]
        block = int(next(part for part in layer["name"].split(".") if part.isdigit()))
        kinds.setdefault(kind, []).append((block, layer["sparsity"], layer["error"]))
    for kind, points in kinds.items():
        top.plot([p[0] for p in points], [100 * p[1] for p in points], marker=".", label=kind)
        with_error = [(p[0], p[2]) for p in points if p[2] is not None]
        bottom.plot([p[0] for p in with_error], [p[1] for p in with_error], marker=".", label=kind)
    top.set(ylabel="zeros (%)", title=title, ylim=(-2, 102))
    bottom.set(xlabel="block", ylabel="relative output error")
    if any(layer["error"] for layer in report.layers):
        bottom.set_yscale("log")
    if kinds:
        bottom.legend(ncols=len(kinds), fontsize="small")
    layers_path = folder / "layers.png"
    figure.savefig(layers_path, dpi=120)
    return [*paths, layers_path]


def _plot_iterations(report: PruningReport, title: str, folder: Path) -> Path:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for iteration in range(max(len(block["errors"]) for block in report.blocks)):
        blocks = [block for block in report.blocks if len(block["errors"]) > iteration]
        axes.plot(
            [block["index"] for block in blocks],
            [block["errors"][iteration] for block in blocks],
            marker="o",
            markersize=3,
            label="local solver" if iteration == 0 else f"iteration {iteration + 1}",
        )
    axes.set(xlabel="block", ylabel="relative error of the feed-forward output", title=title, yscale="log")
    axes.legend()
    path = folder / "error_per_iteration.png"
    figure.savefig(path, dpi=120)
    return path
