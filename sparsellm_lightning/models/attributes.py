"""What is taken from a LightningModule besides its model. Attributes of other kinds are the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from sparsellm_lightning.models.causal_lm import CausalLM


def pretrained_of(module: pl.LightningModule) -> str | None:
    """The name of the model that a module was made from: its ``pretrained``, if that is a string or a path."""
    name = getattr(module, "pretrained", None)
    return str(name) if isinstance(name, (str, Path)) else None


def tokenizer_of(owner: Any) -> Any | None:
    """The ``tokenizer`` of an object, if it is one of ``transformers``. None otherwise."""
    found = getattr(owner, "tokenizer", None)
    return found if hasattr(found, "save_pretrained") and hasattr(found, "batch_decode") else None


def weights_of(module: pl.LightningModule) -> str | None:
    """The name of the sparse weights that a module was made from: ``weights`` of :class:`CausalLM`."""
    return module.weights if isinstance(module, CausalLM) else None


def is_sparse_already(module: pl.LightningModule) -> bool:
    """Whether a module was made to train a sparse model, which is not pruned."""
    return weights_of(module) is not None
