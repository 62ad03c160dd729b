"""Plots of a report. Importing this module needs the ``plots`` extra."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparsellm_lightning.reporting.report import PruningReport

Series = dict[tuple[str, str], list[tuple[int, float]]]  # (stage, tokens) -> (block, error)


def save_plots(report: PruningReport, folder: Path) -> list[Path]:
    """Write ``layers.png``, and ``stages.png`` if the report has errors of blocks. Returns their paths."""
    paths = []
    for name, figure in (("stages.png", stages_figure(report)), ("layers.png", layers_figure(report))):
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            paths.append(folder / name)
    return paths


def sweep_figure(model: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity by sparsity, a line for each variant. The first row is the dense model, a dotted line."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense, *others = rows
    axes.axhline(dense["perplexity"], color="gray", linestyle=":", label="dense")
    for variant in dict.fromkeys(row["variant"] for row in others):
        points = sorted((100 * row["sparsity"], row["perplexity"]) for row in others if row["variant"] == variant)
        axes.plot(*zip(*points, strict=True), marker="o", label=variant)
    axes.set(title=model, xlabel="sparsity asked for (%)", ylabel="perplexity")
    axes.set_yscale("log")
    axes.legend()
    return figure


def stages_figure(report: PruningReport) -> Figure | None:
    """Every block's error after each stage, on fitted and on held-out tokens. None if the report has no errors of blocks.

    One panel shows the feed-forward output, one the block's output.
    """
    panels = {
        "the feed-forward output": _feed_forward_errors(report.blocks),
        "the block's output": _reconstruction_errors(report.blocks),
    }
    panels = {output: series for output, series in panels.items() if series}
    if not panels:
        return None
    figure = Figure(figsize=(10, 1 + 3.5 * len(panels)), layout="constrained")
    figure.suptitle(_title(report))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (output, series) in zip(all_axes, panels.items(), strict=True):
        colors = {stage: f"C{index}" for index, stage in enumerate(dict.fromkeys(stage for stage, _ in series))}
        for (stage, tokens), points in series.items():
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                color=colors[stage],
                linestyle="-" if tokens == "fitted" else "--",
                label=f"{stage}, {tokens} tokens",
            )
        axes.set(ylabel=f"relative error of {output}")
        _log_scale(axes)
        axes.legend(fontsize="small")
    all_axes[-1].set(xlabel="block")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def layers_figure(report: PruningReport) -> Figure:
    """Sparsity and error of every projection, by block. Sparsities that differ are shown with their mean as a dotted line."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    kinds: dict[str, list[tuple[int, float, float | None]]] = defaultdict(list)
    for layer in report.layers:
        kind = layer["name"].rsplit(".", 1)[-1]
        numbers = [part for part in layer["name"].split(".") if part.isdigit()]
        block = int(numbers[0]) if numbers else 0  # blocks may have names
        kinds[kind].append((block, 100 * layer["sparsity"], layer["error"]))
    for kind, marker in zip(kinds, "osv^D<>" * len(kinds), strict=False):
        blocks, zeros, errors = zip(*kinds[kind], strict=True)
        # Projections of equal sparsity overlap. Small markers of different shapes keep them visible.
        style = {"marker": marker, "markersize": 4, "markerfacecolor": "none", "linewidth": 1, "label": kind}
        top.plot(blocks, zeros, **style)
        bottom.plot(blocks, [float("nan") if error is None else error for error in errors], **style)
    pruned = [100 * layer["sparsity"] for layer in report.layers if layer["sparsity"] > 0.01]
    low, high = min(pruned, default=0), max(pruned, default=0)
    if high - low < 1:
        top.set_ylim(-2, 102)
    else:
        top.axhline(100 * report.exported_sparsity, color="gray", linestyle=":")
        top.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    top.set(ylabel="zeros (%)", title=_title(report))
    bottom.set(xlabel="block", ylabel="relative output error")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    _log_scale(bottom)
    if kinds:
        bottom.legend(ncols=len(kinds), fontsize="small")
    return figure


def _title(report: PruningReport) -> str:
    return f"{report.model}, {report.label}, {100 * report.exported_sparsity:.1f} % zeros"


def _feed_forward_errors(blocks: list[dict[str, Any]]) -> Series:
    """Errors of the local solver, and of the alternation's best iterate (chosen on held-out tokens if there are any)."""
    series: Series = defaultdict(list)
    for block in blocks:
        measured = {"fitted": block["errors"], "held-out": block["held_out_errors"]}
        choosing = measured["held-out"] or measured["fitted"]
        for tokens, errors in measured.items():
            if errors:
                series["local solver", tokens].append((block["index"], errors[0]))
            if len(errors) > 1:
                series["alternation", tokens].append((block["index"], errors[choosing.index(min(choosing))]))
    return series


def _reconstruction_errors(blocks: list[dict[str, Any]]) -> Series:
    """Errors before and after reconstruction."""
    series: Series = defaultdict(list)
    for block in blocks:
        for key, tokens in (("fitted", "fitted"), ("held_out", "held-out")):
            errors = (block["reconstruction"] or {}).get(key, (None, None))
            for stage, error in zip(("before reconstruction", "after reconstruction"), errors, strict=True):
                if error is not None:
                    series[stage, tokens].append((block["index"], error))
    return series


def _log_scale(axes: Any) -> None:
    """Use a logarithmic scale if any value is positive."""
    if any((line.get_ydata(orig=False) > 0).any() for line in axes.lines):
        axes.set_yscale("log")
