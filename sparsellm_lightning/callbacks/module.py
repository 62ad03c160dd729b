"""What the callbacks take from a LightningModule besides its model. Attributes of other kinds are the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from sparsellm_lightning.models import CausalLM


def pretrained_of(pl_module: pl.LightningModule) -> str | None:
    """The name of the model that a module was made from: its ``pretrained``, if that is a string or a path."""
    name = getattr(pl_module, "pretrained", None)
    return str(name) if isinstance(name, (str, Path)) else None


def tokenizer_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any | None:
    """The module's ``tokenizer``, or else the datamodule's. None if neither is one of ``transformers``."""
    owners = (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
    found = (getattr(owner, "tokenizer", None) for owner in owners)
    return next((t for t in found if hasattr(t, "save_pretrained") and hasattr(t, "batch_decode")), None)


def is_sparse_already(pl_module: pl.LightningModule) -> bool:
    """Whether a module was made to train a sparse model, which is not pruned."""
    return isinstance(pl_module, CausalLM) and pl_module.weights is not None
