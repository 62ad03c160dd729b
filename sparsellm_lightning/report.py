"""What a run did, measured on the weights that were written: as JSON, as a table, as plots."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsellm_lightning.architectures import DecoderLayout, device_of
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.strategies import StrategyAdapter

REPORT_NAME = "pruning_report.json"
_PACKAGES = ("sparsellm-lightning", "torch", "lightning", "transformers", "datasets", "torchmetrics")


@dataclass
class PruningReport:
    """Everything a run measured.

    Args:
        model: what was pruned.
        method, pattern: as configured.
        sparsity: ``{"requested", "achieved"}``; achieved is over all projections of the decoder blocks, skipped ones too.
        perplexity: ``{"dense", "pruned"}`` and, after fine-tuning, ``"finetuned"``; None where not measured.
        layers: ``{"name", "shape", "sparsity", "error"}`` of every projection, error as in
            :class:`~sparsellm_lightning.results.BlockResult`, None for one left dense.
        blocks: by block, what :class:`~sparsellm_lightning.results.BlockResult` holds, but for the layers' errors.
        calibration: ``{"windows", "held_out", "written", "tokens"}`` over all ranks, and in a Trainer the ``"source"`` of the
            text: ``self`` is the model's own. Written windows are those of ``continuations``; tokens are of both kinds.
        phases: seconds of writing these (``generation``), of block forwards (``forward``), Gram matrices (``statistics``; with
            a local method also those inside the feed-forward block), local solver (``local_solve``), alternation
            (``alternation``), measuring the parts for an uneven budget (``allocation``), reconstruction (``reconstruction``),
            and in a Trainer those of measuring perplexity (``evaluation``) and writing the model (``export``).
        work: floating-point operations of this rank by phase and dtype of the operands, counted from the shapes of the
            products; elementwise work is left out, and what allocation does.
        gemm_peak: FLOP/s of a large product on this device, by dtype, measured when pruning ended.
        wall_seconds: of pruning: calibration and solve.
        peak_memory_bytes: of this process (resident set), or of its accelerator.
        versions: of Python and the packages that matter.
        config: the settings.
        mask_check: after fine-tuning, ``{"checks", "layers", "zeros", "broken"}``: how often every zero of how many layers was
            compared with its mask, and how many had changed (a run with any stops).
        stages: of gradual pruning, ``{"step", "sparsity", "before", "after"}``: perplexity around each.
    """

    model: str
    method: str
    pattern: str
    sparsity: dict[str, float]
    perplexity: dict[str, float | None]
    layers: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    calibration: dict[str, Any]
    phases: dict[str, float]
    wall_seconds: float
    peak_memory_bytes: int
    config: dict[str, Any]
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    gemm_peak: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    mask_check: dict[str, int] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What pruned: the method, or the quality with its method in brackets."""
        quality = self.config.get("quality")
        return f"{quality} ({self.method})" if quality else self.method

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def peak_share(self, *phases: str) -> float:
        """Seconds that the products of some phases (all of pruning's, by default) would take at the measured peak of their
        dtype, divided by the seconds they took; 0 where nothing was counted."""
        chosen = phases or tuple(self.work)
        ideal = sum(
            count / self.gemm_peak[dtype] for phase in chosen for dtype, count in self.work.get(phase, {}).items()
        )
        # All the seconds of pruning count: what belongs to no phase is overhead too.
        taken = sum(self.phases.get(phase, 0.0) for phase in phases) if phases else self.wall_seconds
        return ideal / taken if taken else 0.0

    def phase_table(self) -> str:
        """Seconds by phase, TFLOP, and the share of the GEMM peak."""
        rows: list[tuple[str, ...]] = [("phase", "seconds", "TFLOP", "of peak")]
        for phase, seconds in self.phases.items():
            work = sum(self.work.get(phase, {}).values())
            share = f"{100 * self.peak_share(phase):.0f} %" if work else "-"
            rows.append((phase, f"{seconds:.1f}", f"{work / 1e12:.2f}" if work else "-", share))
        return format_table(rows)

    def save(self, folder: str | Path) -> Path:
        """Write ``pruning_report.json``, and plots where matplotlib is installed."""
        path = Path(folder) / REPORT_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        try:
            from sparsellm_lightning.plots import save_plots
        except ImportError:
            return path
        save_plots(self, Path(folder))
        return path

    def table(self) -> str:
        """The run in a few lines of text."""
        achieved = f"{100 * self.sparsity['achieved']:.2f} %"
        rows = [
            ("model", "method", "sparsity", "perplexity", "seconds"),
            (self.model, "dense", "0 %", _number(self.perplexity.get("dense")), ""),
        ]
        rows.append(
            (self.model, self.label, achieved, _number(self.perplexity.get("pruned")), f"{self.wall_seconds:.0f}")
        )
        if "finetuned" in self.perplexity:
            rows.append((self.model, f"{self.label} + fine-tuned", achieved, _number(self.perplexity["finetuned"]), ""))
        return format_table(rows)


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text in aligned columns, the first row as heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def count_zeros(layout: DecoderLayout, adapter: StrategyAdapter) -> dict[str, int]:
    """Zeros in every projection, by name, over all ranks."""
    names, counts = [], []
    for projection in layout.projections():
        names.append(projection.name)
        counts.append(adapter.count_zeros(projection))
    totals = torch.stack(counts)
    adapter.ranks.sum_(totals)
    return {name: int(total) for name, total in zip(names, totals, strict=True)}


def layer_rows(
    layout: DecoderLayout, adapter: StrategyAdapter, errors: dict[str, float]
) -> tuple[list[dict[str, Any]], float]:
    """The report's ``layers``, and the sparsity over all of them, counted in the parameters as they are now."""
    zeros = count_zeros(layout, adapter)
    layers, entries = [], 0
    for projection in layout.projections():
        rows, columns = projection.shape
        entries += rows * columns
        layers.append(
            {
                "name": projection.name,
                "shape": [rows, columns],
                "sparsity": zeros[projection.name] / (rows * columns),
                "error": errors.get(projection.name),
            }
        )
    return layers, sum(zeros.values()) / entries


def report_of_sparse(layout: DecoderLayout, adapter: StrategyAdapter, config: PruningConfig) -> PruningReport:
    """The report of a model that was already sparse: nothing was pruned here, so there are no errors and no seconds."""
    layers, achieved = layer_rows(layout, adapter, {})
    return PruningReport(
        model=layout.model.config.name_or_path or type(layout.model).__name__,
        method="already sparse",
        pattern=config.pattern,
        sparsity={"requested": achieved, "achieved": achieved},
        perplexity={"dense": None, "pruned": None},
        layers=layers,
        blocks=[],
        calibration={"windows": 0, "tokens": 0},
        phases={},
        wall_seconds=0.0,
        peak_memory_bytes=peak_memory(device_of(layout.model)),
        config={},
    )


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the accelerator, or resident on the CPU, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: on Linux its peak includes that of the process which started this one.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
