"""Lightning callbacks: pruning, sparse fine-tuning, distillation."""

from sparsellm_lightning.callbacks.distillation import Distillation
from sparsellm_lightning.callbacks.finetuning import SparseFinetuning
from sparsellm_lightning.callbacks.pruning import SparseLLMCallback

__all__ = ["Distillation", "SparseFinetuning", "SparseLLMCallback"]
