"""Prune pretrained causal language models inside a Lightning Trainer.

The callback :class:`SparseLLMCallback` prunes when training starts. :func:`prune_model` does the same without a Trainer.
:class:`SparseFinetuning` keeps the zeros of any sparse model in training, :class:`KeepZeros` and :func:`holding_zeros` outside
Lightning. :class:`Distillation` adds a dense teacher to the loss. The solvers in :mod:`sparsellm_lightning.solvers` are pure
tensor functions.
"""

from sparsellm_lightning.architecture import Architecture, register_architecture
from sparsellm_lightning.callbacks import Distillation, KeepZeros, SparseFinetuning, SparseLLMCallback
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import TextDataModule, generate_windows
from sparsellm_lightning.errors import MaskError, NumericalError, UserError
from sparsellm_lightning.models import CausalLM, export_model, load_model, load_tokenizer, perplexity, verify_export
from sparsellm_lightning.pipeline import prune_model
from sparsellm_lightning.reporting import PruningReport
from sparsellm_lightning.sparsity import LoraOptions, holding_zeros

__all__ = [
    "Architecture",
    "CausalLM",
    "Distillation",
    "KeepZeros",
    "LoraOptions",
    "MaskError",
    "NumericalError",
    "PruningConfig",
    "PruningReport",
    "SparseFinetuning",
    "SparseLLMCallback",
    "TextDataModule",
    "UserError",
    "export_model",
    "generate_windows",
    "holding_zeros",
    "load_model",
    "load_tokenizer",
    "perplexity",
    "prune_model",
    "register_architecture",
    "verify_export",
]
