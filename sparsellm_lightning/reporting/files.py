"""Files beside an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsellm_lightning.reporting.card import model_card
from sparsellm_lightning.reporting.page import report_page, sweep_page
from sparsellm_lightning.reporting.report import PruningReport

# Names of files may hold bytes that are no UTF-8.
_ENCODING: dict[str, str] = {"encoding": "utf-8", "errors": "backslashreplace"}


def save_companions(report: PruningReport, folder: Path, packed: bool = False) -> None:
    """Write the model card and ``report.html`` beside exported weights, and the report's plots if matplotlib is installed.

    Args:
        report: of the run.
        folder: of the weights.
        packed: whether their files leave the zeros out.
    """
    images: list[str] = []
    try:
        from sparsellm_lightning.reporting.plots import save_plots
    except ImportError:
        pass
    else:
        images = [path.name for path in save_plots(report, folder)]
    (folder / "README.md").write_text(model_card(report, images, packed), **_ENCODING)
    (folder / "report.html").write_text(report_page(report, folder, images), **_ENCODING)


def save_sweep(model: str, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write ``sweep.html``, and ``sweep.png`` if matplotlib is installed.

    Args:
        model: name of the model.
        rows: ``variant``, ``sparsity``, ``perplexity`` and other figures of each run. The first is the dense model.
        folder: of the files.
    """
    try:
        from sparsellm_lightning.reporting.plots import sweep_figure
    except ImportError:
        picture = None
    else:
        picture = folder / "sweep.png"
        sweep_figure(model, rows).savefig(picture, dpi=120)
    (folder / "sweep.html").write_text(sweep_page(model, rows, picture), **_ENCODING)
