"""How a sparsity is divided over the projections of a model, and which blocks leave."""

from sparsellm_lightning.allocation.depth import choose_blocks, leave_out
from sparsellm_lightning.allocation.sensitivity import allocate

__all__ = ["allocate", "choose_blocks", "leave_out"]
