"""What keeps zeros in training: masks of weights, and of LoRA adapters."""

from sparsellm_lightning.sparsity.hold import holding_zeros
from sparsellm_lightning.sparsity.lora import (
    LoraOptions,
    adapter_at_work,
    add_adapters,
    check_mergeable,
    filled_by_merge,
    has_adapters,
    mask_adapters,
    mask_adapters_by_zeros,
    maskable_adapters,
    merged_state,
)
from sparsellm_lightning.sparsity.masks import (
    MANY_ZEROS,
    SPARSE,
    Masks,
    left_out_biases,
    linear_layers,
    pack,
    pruned_before,
    sparse_layers,
    unpack,
    zero_shares,
)

__all__ = [
    "MANY_ZEROS",
    "SPARSE",
    "LoraOptions",
    "Masks",
    "adapter_at_work",
    "add_adapters",
    "check_mergeable",
    "filled_by_merge",
    "has_adapters",
    "holding_zeros",
    "left_out_biases",
    "linear_layers",
    "mask_adapters",
    "mask_adapters_by_zeros",
    "maskable_adapters",
    "merged_state",
    "pack",
    "pruned_before",
    "sparse_layers",
    "unpack",
    "zero_shares",
]
