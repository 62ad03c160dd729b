"""Keeps advertisements, notes about other packages' insides, and bars in log files out of the commands' output."""

from __future__ import annotations

import logging
import os
import warnings

from transformers.utils.logging import disable_progress_bar

from sparsellm_lightning.runtime import draws_bars

_NOTES = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's call of torch
    r".*`tensorboardX` has been removed",
    r".*No seed found",
    r".*litlogger",
)


def quieten() -> None:
    """Drop notes from warnings and from Lightning's log and, outside a terminal, the bars of transformers and datasets."""
    if not draws_bars():
        disable_progress_bar()
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read on import, which comes later, if at all
    for note in _NOTES:
        warnings.filterwarnings("ignore", message=note)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
