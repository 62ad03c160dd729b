"""Keeps advertisements and notes about other packages' insides out of what the commands print."""

from __future__ import annotations

import logging
import warnings

_NOTES = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's call of torch
    r".*`tensorboardX` has been removed",
    r".*No seed found",
    r".*litlogger",
)


def quieten() -> None:
    """Drop them from warnings and from Lightning's log."""
    for note in _NOTES:
        warnings.filterwarnings("ignore", message=note)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
