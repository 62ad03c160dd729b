"""What a run reports: errors, sparsity, perplexity and seconds, as JSON, tables and plots."""

from sparsellm_lightning.reporting.files import save_companions, save_sweep
from sparsellm_lightning.reporting.inspection import structure
from sparsellm_lightning.reporting.report import (
    RESTORED,
    BlockResult,
    PruningReport,
    format_table,
    layer_rows,
    report_of_smaller,
    report_of_sparse,
    versions,
)
from sparsellm_lightning.reporting.speed import speed_table

__all__ = [
    "RESTORED",
    "BlockResult",
    "PruningReport",
    "format_table",
    "layer_rows",
    "report_of_smaller",
    "report_of_sparse",
    "save_companions",
    "save_sweep",
    "speed_table",
    "structure",
    "versions",
]
