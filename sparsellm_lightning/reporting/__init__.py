"""What a run reports: errors, sparsity, perplexity and seconds, as JSON, tables and plots."""

from sparsellm_lightning.reporting.files import REPORT_NAME, save_report
from sparsellm_lightning.reporting.report import (
    BlockResult,
    PruningReport,
    format_table,
    layer_rows,
    report_of_sparse,
    versions,
)

__all__ = [
    "REPORT_NAME",
    "BlockResult",
    "PruningReport",
    "format_table",
    "layer_rows",
    "report_of_sparse",
    "save_report",
    "versions",
]
