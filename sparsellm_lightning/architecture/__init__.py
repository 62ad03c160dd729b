"""Where a model keeps its decoder blocks and their projections."""

from sparsellm_lightning.architecture.discovery import (
    decoder_blocks,
    describe,
    device_of,
    find_model,
    unwrapped_names,
)
from sparsellm_lightning.architecture.layout import Block, DecoderLayout, Projection
from sparsellm_lightning.architecture.table import ARCHITECTURES, Architecture, register_architecture

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Block",
    "DecoderLayout",
    "Projection",
    "decoder_blocks",
    "describe",
    "device_of",
    "find_model",
    "register_architecture",
    "unwrapped_names",
]
