"""Files beside an exported model."""

from __future__ import annotations

from pathlib import Path

from sparsellm_lightning.reporting.card import model_card
from sparsellm_lightning.reporting.report import PruningReport


def save_companions(report: PruningReport, folder: Path) -> None:
    """Write the model card into a folder, and the report's plots if matplotlib is installed."""
    images: list[str] = []
    try:
        from sparsellm_lightning.reporting.plots import save_plots
    except ImportError:
        pass
    else:
        images = [path.name for path in save_plots(report, folder)]
    (folder / "README.md").write_text(model_card(report, images))
