"""Prune pretrained causal language models inside a Lightning Trainer.

The callback :class:`SparseLLMCallback` prunes when training starts; :func:`prune_model` does the same without a Trainer;
:class:`SparseFinetuning` keeps the zeros of any sparse model in training, :class:`Distillation` adds a dense teacher to it;
the solvers in :mod:`sparsellm_lightning.solvers` are pure tensor functions.
"""

from sparsellm_lightning.architectures import Architecture, register_architecture
from sparsellm_lightning.callback import SparseLLMCallback
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.distillation import Distillation
from sparsellm_lightning.errors import MaskError, NumericalError, UserError
from sparsellm_lightning.evaluate import perplexity
from sparsellm_lightning.export import export_model
from sparsellm_lightning.finetuning import SparseFinetuning
from sparsellm_lightning.generation import generate_windows
from sparsellm_lightning.loading import load_model, load_tokenizer
from sparsellm_lightning.lora import LoraOptions
from sparsellm_lightning.module import CausalLM
from sparsellm_lightning.pruning import prune_model
from sparsellm_lightning.report import PruningReport

__all__ = [
    "Architecture",
    "CausalLM",
    "Distillation",
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
    "load_model",
    "load_tokenizer",
    "perplexity",
    "prune_model",
    "register_architecture",
]
