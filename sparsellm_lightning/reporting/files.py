"""Files beside an exported model."""

from __future__ import annotations

from pathlib import Path

from sparsellm_lightning.reporting.report import PruningReport


def save_plots_if_possible(report: PruningReport, folder: Path) -> None:
    """Write the report's plots into a folder, if matplotlib is installed."""
    try:
        from sparsellm_lightning.reporting.plots import save_plots
    except ImportError:
        return
    save_plots(report, folder)
