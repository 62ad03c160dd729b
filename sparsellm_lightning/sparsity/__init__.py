"""What keeps zeros in training: masks of weights, and of LoRA adapters."""

from sparsellm_lightning.sparsity.lora import LoraOptions, add_adapters, has_adapters, keep_zeros, merged_state
from sparsellm_lightning.sparsity.masks import Masks, pack, sparse_projections, unpack

__all__ = [
    "LoraOptions",
    "Masks",
    "add_adapters",
    "has_adapters",
    "keep_zeros",
    "merged_state",
    "pack",
    "sparse_projections",
    "unpack",
]
