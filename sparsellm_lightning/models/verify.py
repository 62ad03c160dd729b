"""Comparing an export with its report: what the files hold, and what the report says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sparsellm_lightning.architecture import DecoderLayout, Projection, describe
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.evaluation import perplexity
from sparsellm_lightning.models.export import REPORT_NAME
from sparsellm_lightning.models.loading import load_exported
from sparsellm_lightning.runtime import to_best_device
from sparsellm_lightning.solvers import all_finite


def verify_export(folder: str | Path, batches: Iterable[Any] | None = None, tolerance: float = 0.01) -> list[str]:
    """Recompute from an export's files what its report says.

    Checked are: the files that the report names; every tensor's finiteness; a tied head; the tensors and shapes that the
    configuration asks for; zeros of every projection, exactly; the pattern. If all hold, there are batches, and the model has
    a language-model head: also perplexity.

    Args:
        folder: an export.
        batches: of the text on which the report's perplexity was measured. None: perplexity is not measured.
        tolerance: largest relative difference of perplexities. Other machines and precisions round differently.

    Returns:
        one sentence for each difference, and one if ``batches`` are given but the report has no perplexity. Empty: none.

    Raises:
        UserError: there is no such folder, or its report cannot be read.
    """
    path = Path(folder).expanduser()
    report = read_report(path)
    found = [
        f"{name}: the report names this file, but it is missing"
        for name in report["files"]
        if not (path / name).exists()
    ]
    found += _compare_values(path)
    try:
        model = load_exported(path).eval()
    except UserError as error:
        return [*found, str(error)]
    found += _compare_tied(model, AutoConfig.from_pretrained(path, trust_remote_code=False))  # nosec B615
    ignored = (report.get("config") or {}).get("ignore", ())
    found += _compare_sparsity(describe(model, PruningConfig(ignore=tuple(ignored))), report)
    if batches is not None and not found and model.get_output_embeddings() is not None:
        to_best_device(model)
        measured = perplexity(model, batches)
        reported = report["perplexity"].get("finetuned", report["perplexity"].get("pruned"))
        if reported is None:
            found.append(f"perplexity: the report has none, the files give {measured:.4f}")
        elif not abs(measured - reported) <= tolerance * reported:
            of = report.get("evaluation")
            text = f" on {of['windows']} windows of {of['length']} tokens of {of['source']}" if of else ""
            found.append(
                f"perplexity: the report says {reported:.4f}{text}, the files give {measured:.4f} on this text"
            )
    return found


def _compare_values(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dictionary
                    if not all_finite(opened.get_tensor(name)):
                        yield f"{name}: holds NaN or infinity"
        except (OSError, SafetensorError) as error:
            yield f"{file.name}: cannot be read ({error})"


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of an export.

    Raises:
        UserError: there is no such folder, or its report cannot be read.
    """
    try:
        text = (Path(folder).expanduser() / REPORT_NAME).read_text(encoding="utf-8")
        report = json.loads(text, parse_constant=_refuse_constant)
        missing = {"files", "layers", "sparsity", "pattern", "perplexity"} - report.keys()
        cause = f"it lacks {', '.join(sorted(missing))}" if missing else ""
    except (OSError, ValueError, AttributeError) as error:
        cause = str(error)
    if cause:
        raise UserError(
            f"verify needs an export with a whole {REPORT_NAME}, but that of {folder} cannot be used ({cause}). Name the "
            "folder that export_dir named."
        )
    plain: dict[str, Any] = report
    return plain


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _compare_tied(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[str]:
    head = model.get_output_embeddings()
    # The configuration of the file: that of a loaded model says whether its head is tied indeed.
    tied = getattr(config, "tie_word_embeddings", False)  # some configurations do not define it
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        yield "the head: the configuration ties it to the embedding, the files hold two different tensors"


def _compare_sparsity(layout: DecoderLayout, report: dict[str, Any]) -> Iterator[str]:
    reported = {layer["name"]: layer["sparsity"] for layer in report["layers"]}
    projections = {p.name: p for p in layout.projections()}
    for name in sorted(reported.keys() ^ projections.keys()):
        where = "the report, not in the model" if name in reported else "the model, not in the report"
        yield f"{name}: this projection is in {where}"
    total = 0
    for name, p in projections.items():
        zeros = int((p.matrix == 0).sum())
        total += zeros
        if name in reported and zeros != round(reported[name] * p.size):
            yield f"{name}: the report says {reported[name]:.6f} zeros, the files hold {zeros / p.size:.6f}"
        if p.pruned and zeros and not _has_pattern(p, report["pattern"]):
            yield f"{name}: the report says pattern {report['pattern']}, the files break it"
    share = total / sum(p.size for p in projections.values())
    said = report["sparsity"].get("exported", report["sparsity"]["achieved"])
    if not math.isclose(share, said, abs_tol=1e-9):
        yield f"sparsity: the report says {said:.6f} over all projections, the files hold {share:.6f}"


def _has_pattern(projection: Projection, pattern: str) -> bool:
    """Whether every group of an N:M pattern has its zeros. True for patterns without groups."""
    if ":" not in pattern:
        return True
    config = PruningConfig(pattern=pattern)
    zeros = (projection.matrix == 0).unfold(1, config.group, config.group).sum(-1)
    return bool((zeros >= round(config.group * config.requested_sparsity)).all())
