"""Callbacks: pruning, sparse fine-tuning and distillation under Lightning; zeros kept under Hugging Face's Trainer."""

from sparsellm_lightning.callbacks.distillation import Distillation
from sparsellm_lightning.callbacks.elsewhere import KeepZeros
from sparsellm_lightning.callbacks.finetuning import SparseFinetuning
from sparsellm_lightning.callbacks.pruning import SparseLLMCallback

__all__ = ["Distillation", "KeepZeros", "SparseFinetuning", "SparseLLMCallback"]
