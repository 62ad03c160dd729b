"""What the machine decides and shows: memory, the arithmetic of products, where the time goes, who writes to a folder."""

from sparsellm_lightning.runtime.claims import claimed
from sparsellm_lightning.runtime.device import best_device, check_device, to_best_device
from sparsellm_lightning.runtime.memory import (
    MemoryMeter,
    Placement,
    Sizes,
    explaining_memory,
    format_bytes,
    keeping_freed_memory,
    peak_memory,
    place,
    return_free_memory,
    room,
)
from sparsellm_lightning.runtime.precision import coarse_dtype, dtype_of_products, fastest_float32
from sparsellm_lightning.runtime.profiling import Profile, gemm_peak, phase
from sparsellm_lightning.runtime.progress import BlockProgress, draws_bars, showing, tracked

__all__ = [
    "BlockProgress",
    "MemoryMeter",
    "Placement",
    "Profile",
    "Sizes",
    "best_device",
    "check_device",
    "claimed",
    "coarse_dtype",
    "draws_bars",
    "dtype_of_products",
    "explaining_memory",
    "fastest_float32",
    "format_bytes",
    "gemm_peak",
    "keeping_freed_memory",
    "peak_memory",
    "phase",
    "place",
    "return_free_memory",
    "room",
    "showing",
    "to_best_device",
    "tracked",
]
