"""The measurements of a run: a dataclass, its tables, and the rows that are counted in the model's weights."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sparsellm_lightning.architecture import DecoderLayout
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.models import Smaller

RESTORED = "restored"  # phase: seconds that earlier runs took for the blocks that a resumed run found
_PACKAGES = ("sparsellm-lightning", "torch", "lightning", "transformers", "datasets", "torchmetrics")


@dataclass
class BlockResult:
    """Errors of one block, and the seconds it took.

    Args:
        index: of the block.
        errors: relative error of the feed-forward output after each iteration of the alternation, ``‖Y − FFN(X)‖² / ‖Y‖²``, on
            fitted tokens. Empty in blocks that the local solver solves. In a block with experts: the error of its network that
            sees every token (shared expert), or, if there is none, the mean over experts.
        held_out_errors: the same on held-out tokens. Empty if there are none.
        borrowing_experts: number of experts with fewer fitted tokens than hidden features, whose statistics were partly those
            of all tokens.
        layer_errors: by projection, ``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`` after its solve and before reconstruction, where X are the fitted
            tokens of the input it was calibrated on.
        reconstruction: ``"steps"`` that were kept, and relative errors of the block's output before and after, ``"fitted"`` and
            ``"held_out"`` (None without held-out tokens). None without reconstruction.
        seconds: wall time.
    """

    index: int
    errors: list[float] = field(default_factory=list)
    held_out_errors: list[float] = field(default_factory=list)
    layer_errors: dict[str, float] = field(default_factory=dict)
    reconstruction: dict[str, Any] | None = None
    borrowing_experts: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Figures for a logger: errors on held-out tokens if there are any, and seconds."""
        found = {"seconds_of_block": self.seconds}
        if self.layer_errors:
            found["layer_error"] = sum(self.layer_errors.values()) / len(self.layer_errors)
        if self.errors:
            found["feed_forward_error"] = min(self.held_out_errors or self.errors)
        if self.reconstruction is not None:
            (_, fitted), (_, held_out) = self.reconstruction["fitted"], self.reconstruction["held_out"]
            found["block_error"] = fitted if held_out is None else held_out
        return found


@dataclass
class PruningReport:
    """The measurements of a run.

    Args:
        model: name of the model.
        method, pattern: as in the settings.
        sparsity: ``{"requested", "achieved"}``. Achieved is over all projections of the decoder blocks, ignored ones included.
            After units, heads or blocks are cut out, also ``"exported"``: of the files.
        perplexity: ``{"dense", "pruned"}``, after fine-tuning ``"finetuned"``, and with ``baseline`` ``"sparsegpt"``: of the
            model pruned by SparseGPT alone. None where not measured.
        layers: ``{"name", "shape", "sparsity", "error"}`` of every projection. The error is ``layer_errors`` of
            :class:`BlockResult`. None for a projection that was not solved, or in which rows were only set to zero.
        blocks: the fields of :class:`BlockResult` by block, without the layers' errors, and ``"dense"``: the linear layers that
            cannot be pruned, with the reason.
        calibration: over all ranks, ``{"windows", "held_out", "written", "tokens"}``, and in a Trainer the ``"source"`` of the
            text (``self``: the model wrote it). Written windows are those of ``continuations``, whose tokens ``"tokens"`` does
            not count.
        evaluation: of perplexity in a Trainer, ``{"source", "windows", "length"}``. None where not measured.
        data: arguments of the :class:`~sparsellm_lightning.TextDataModule` that differ from their defaults. None without one.
        examples: beginnings of evaluation windows, ``"prompt"``, and how the ``"dense"``, ``"pruned"`` and ``"finetuned"``
            model continue them, always with the likeliest token. Empty where not measured.
        phases: seconds by phase. ``generation``: writing windows. ``allocation``: measuring parts of the model. ``importance``:
            of features, for reconstruction. ``restored``: by earlier runs, for the blocks that a resumed run found.
            ``forward``: block forwards. ``statistics``: Gram matrices. ``local_solve``: local solver. ``alternation``.
            ``reconstruction``. ``distillation``. In a Trainer also ``evaluation``: perplexity, ``baseline``: SparseGPT, and
            ``export``: writing the model.
        work: floating-point operations of this rank by phase and dtype, from the shapes of the matrix products. Elementwise
            operations are not counted.
        gemm_peak: FLOP/s of a large product on this device by dtype, measured at the end of pruning.
        wall_seconds: of pruning, with ``restored``. For gradual pruning, this, phases and work are sums over all stages.
        peak_memory_bytes: peak of this process (resident memory), or of its accelerator, during pruning, the model included.
            None where the system does not say.
        added_memory_bytes: the part of the peak that pruning added to what was in use when it began.
        dtype: of the model's weights.
        versions: of Python and of the packages that decide the result.
        config: the settings.
        distillation: ``{"steps", "divergence"}``: steps that were kept, and the mean KL divergence from the dense model's
            next-token distributions before and after, on held-out windows if there are any. None if there were no steps.
        mask_check: after fine-tuning, ``{"checks", "layers", "zeros"}``: number of comparisons with the masks, and layers and
            zeros compared. A run with a changed zero stops.
        removed_blocks: indices of the blocks that the written model lacks. ``blocks`` are the others.
        stages: of gradual pruning, ``{"step", "sparsity", "before", "after"}``, with the perplexity before and after the stage.
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
    peak_memory_bytes: int | None
    added_memory_bytes: int | None
    config: dict[str, Any]
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    gemm_peak: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    dtype: str = ""
    evaluation: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    examples: list[dict[str, str]] = field(default_factory=list)
    distillation: dict[str, Any] | None = None
    mask_check: dict[str, int] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    removed_blocks: list[int] = field(default_factory=list)

    def add_stage(self, before: PruningReport) -> None:
        """Add the time and work of the earlier stages of gradual pruning."""
        self.wall_seconds += before.wall_seconds
        self.gemm_peak = before.gemm_peak | self.gemm_peak
        for name, seconds in before.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds
        for name, counts in before.work.items():
            mine = self.work.setdefault(name, {})
            for dtype, number in counts.items():
                mine[dtype] = mine.get(dtype, 0.0) + number
        peaks = (self.peak_memory_bytes, before.peak_memory_bytes), (self.added_memory_bytes, before.added_memory_bytes)
        self.peak_memory_bytes, self.added_memory_bytes = (
            max((peak for peak in pair if peak is not None), default=None) for pair in peaks
        )

    @property
    def label(self) -> str:
        """The preset with its method in brackets, or the method alone for preset ``paper``."""
        preset = self.config.get("preset", "paper")
        return self.method if preset == "paper" else f"{preset} ({self.method})"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return asdict(self)

    def losses(self) -> list[tuple[str, ...]]:
        """A table of the perplexities, with the loss ``ln(perplexity / dense)``, and R: the loss as a share of SparseGPT's."""
        known = {name: value for name, value in self.perplexity.items() if value is not None}
        rows: list[tuple[str, ...]] = [("", "perplexity", "ln(perplexity / dense)", "R")]
        losses = {name: math.log(value / known["dense"]) for name, value in known.items() if "dense" in known}
        reference = losses.get("sparsegpt", 0.0)
        for name, value in known.items():
            loss = f"{losses[name]:.3f}" if name in losses and name != "dense" else ""
            rows.append(
                (name, f"{value:.2f}", loss, f"{losses[name] / reference:.2f}" if loss and reference > 0 else "")
            )
        shown = 4 if reference > 0 else 3
        return [row[:shown] for row in rows]

    @property
    def exported_sparsity(self) -> float:
        """Fraction of zeros in the projections as they are written: without what is removed as a whole."""
        return float(self.sparsity.get("exported", self.sparsity["achieved"]))

    def metrics(self) -> dict[str, float]:
        """The run's figures for a logger: sparsity, perplexities, seconds of pruning and of each phase."""
        found = {"sparsity": self.sparsity["achieved"], "seconds": self.wall_seconds}
        found |= {f"perplexity/{name}": value for name, value in self.perplexity.items() if value is not None}
        # "seconds/NAME" would be a file in the folder "seconds", which MLflow writes as a file.
        return found | {f"seconds_of_phase/{name}": value for name, value in self.phases.items()}

    def peak_share(self, *phases: str) -> float:
        """Share of the measured GEMM peak that some phases reached (default: all of pruning). 0 if no work was counted.

        Seconds that the products would take at the peak of their dtype, divided by the seconds that the phases took.
        """
        chosen = phases or tuple(self.work)
        ideal = sum(
            count / self.gemm_peak[dtype] for phase in chosen for dtype, count in self.work.get(phase, {}).items()
        )
        # Without phases, seconds that belong to no phase count too.
        everything = self.wall_seconds - self.phases.get(RESTORED, 0.0)  # whose work is not known
        taken = sum(self.phases.get(phase, 0.0) for phase in phases) if phases else everything
        return ideal / taken if taken else 0.0

    def phase_table(self) -> str:
        """Seconds by phase, TFLOP, and the share of the GEMM peak."""
        rows: list[tuple[str, ...]] = [("phase", "seconds", "TFLOP", "of peak")]
        for phase, seconds in self.phases.items():
            work = sum(self.work.get(phase, {}).values())
            share = f"{100 * self.peak_share(phase):.0f} %" if work else "-"
            rows.append((phase, f"{seconds:.1f}", f"{work / 1e12:.2f}" if work else "-", share))
        return format_table(rows)

    def table(self) -> str:
        """Perplexity and sparsity of the model: dense, pruned and fine-tuned."""
        achieved = f"{100 * self.sparsity['achieved']:.2f} %"
        rows = [
            ("model", "method", "sparsity", "perplexity", "seconds"),
            (self.model, "dense", "0 %", _number(self.perplexity.get("dense")), ""),
            (self.model, self.label, achieved, _number(self.perplexity.get("pruned")), f"{self.wall_seconds:.0f}"),
        ]
        if "finetuned" in self.perplexity:
            rows.append((self.model, f"{self.label} + fine-tuned", achieved, _number(self.perplexity["finetuned"]), ""))
        return f"{format_table(rows)}\n\n{self.circumstances()}"

    def circumstances(self) -> str:
        """On which text, in which arithmetic, and from which seed the figures come, in one line."""
        parts = []
        if self.calibration.get("windows"):
            source = self.calibration.get("source", "the caller's windows")
            parts.append(f"calibration: {self.calibration['windows']} windows of {source}")
        if self.evaluation is not None:
            evaluation = self.evaluation
            parts.append(
                f"perplexity: {evaluation['windows']} windows of {evaluation['source']}, length {evaluation['length']}"
            )
        parts += [self.dtype] if self.dtype else []
        if self.config:
            parts.append(f"preset {self.config['preset']}, seed {self.config['seed']}")
        return "; ".join(parts)


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text in aligned columns. The first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def layer_rows(
    layout: DecoderLayout,
    adapter: StrategyAdapter,
    errors: dict[str, float | None] | None = None,
    filled: Collection[int] = (),
) -> tuple[list[dict[str, Any]], float]:
    """The report's ``layers``, and the sparsity over all of them, counted in the parameters as they are.

    Args:
        layout: the model's blocks.
        adapter: of the strategy the model runs under. All ranks call this together.
        errors: by projection, for the rows.
        filled: the ``id`` of parameters whose zeros do not count, because an export fills them.
    """
    projections = list(layout.projections())
    zeros = torch.stack([adapter.count_zeros(p) * (id(p.parameter) not in filled) for p in projections])
    adapter.ranks.sum_(zeros)
    layers = [
        {"name": p.name, "shape": list(p.shape), "sparsity": number / p.size, "error": (errors or {}).get(p.name)}
        for p, number in zip(projections, zeros.tolist(), strict=True)
    ]
    return layers, int(zeros.sum()) / sum(p.size for p in projections)


def report_of_smaller(report: PruningReport, layout: DecoderLayout, smaller: Smaller) -> PruningReport:
    """The report of the smaller model, from which the zeroed parts are cut out.

    Args:
        report: of the model with zeros in place of these parts. It gets the sparsity ``exported`` too.
        layout: of that model.
        smaller: the model without these parts.
    """
    rows, zeros, total = [], 0, 0
    for row in (row for row in report.layers if row["name"] in smaller.names):
        before, shape = math.prod(row["shape"]), smaller.shapes[row["name"]]
        size = math.prod(shape)
        kept_zeros = round(row["sparsity"] * before) - (before - size)
        rows.append({**row, "name": smaller.names[row["name"]], "shape": list(shape), "sparsity": kept_zeros / size})
        zeros, total = zeros + kept_zeros, total + size
    report.sparsity["exported"] = zeros / total
    names = [block.name for block in layout.blocks]
    stay = [(new, old) for new, old in enumerate(smaller.blocks) if old < len(report.blocks)]
    blocks = [_renumbered(report.blocks[old], new, names[old], names[new]) for new, old in stay]
    gone = sorted(set(range(len(names))) - set(smaller.blocks))
    return replace(report, layers=rows, blocks=blocks, removed_blocks=gone)


def _renumbered(block: dict[str, Any], index: int, old: str, new: str) -> dict[str, Any]:
    """A block's row with its place and the names of its layers in the smaller model."""
    dense = {new + name.removeprefix(old): reason for name, reason in block.get("dense", {}).items()}
    return {**block, "index": index, "dense": dense}


def report_of_sparse(layout: DecoderLayout, adapter: StrategyAdapter) -> PruningReport:
    """The report of a model that was sparse already. It has no errors and no seconds, because nothing was pruned.

    Args:
        layout: the model's blocks.
        adapter: of the strategy the model runs under. All ranks call this together.
    """
    layers, achieved = layer_rows(layout, adapter)
    return PruningReport(
        model=layout.model.config.name_or_path or type(layout.model).__name__,
        method="already sparse",
        pattern="unstructured",  # what the settings say is not what these weights were pruned by
        sparsity={"requested": achieved, "achieved": achieved},
        perplexity={"dense": None, "pruned": None},
        layers=layers,
        blocks=[],
        calibration={"windows": 0, "tokens": 0},
        phases={},
        wall_seconds=0.0,
        peak_memory_bytes=None,
        added_memory_bytes=None,
        config={},
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
