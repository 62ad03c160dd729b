"""Writing a report beside the exported model."""

from __future__ import annotations

import json
from pathlib import Path

from sparsellm_lightning.reporting.report import PruningReport

REPORT_NAME = "pruning_report.json"


def save_report(report: PruningReport, folder: str | Path) -> Path:
    """Write ``pruning_report.json``, and plots if matplotlib is installed. Returns the path of the JSON file."""
    path = Path(folder) / REPORT_NAME
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    try:
        from sparsellm_lightning.reporting.plots import save_plots
    except ImportError:
        return path
    save_plots(report, Path(folder))
    return path
