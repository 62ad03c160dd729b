"""Prune pretrained causal language models inside a Lightning Trainer.

The callback :class:`SparseLLMCallback` prunes when training starts. :func:`prune_model` does the same without a Trainer.
:class:`SparseFinetuning` keeps the zeros of any sparse model in training, :class:`KeepZeros` and :func:`holding_zeros` outside
Lightning. :class:`Distillation` adds a dense teacher to the loss. The solvers in :mod:`sparsellm_lightning.solvers` are pure
tensor functions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsellm_lightning.architecture import Architecture, register_architecture
    from sparsellm_lightning.callbacks import Distillation, KeepZeros, SparseFinetuning, SparseLLMCallback
    from sparsellm_lightning.config import PruningConfig
    from sparsellm_lightning.data import TextDataModule, generate_windows
    from sparsellm_lightning.errors import MaskError, NumericalError, UserError
    from sparsellm_lightning.models import CausalLM, export_model, load_model, load_tokenizer, perplexity, verify_export
    from sparsellm_lightning.pipeline import prune_model
    from sparsellm_lightning.reporting import PruningReport
    from sparsellm_lightning.sparsity import LoraOptions, holding_zeros

# Rooms from bottom to top. They are imported when a name is asked for, so that `sparsellm --help` does not wait for torch.
_ROOMS = (
    "errors",
    "solvers",
    "config",
    "architecture",
    "sparsity",
    "models",
    "data",
    "reporting",
    "pipeline",
    "callbacks",
)

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


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in _ROOMS:
            module = import_module(f"{__name__}.{room}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
