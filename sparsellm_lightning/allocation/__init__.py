"""How a sparsity is divided over the projections of a model, and what is removed from it as a whole."""

from sparsellm_lightning.allocation.depth import choose_blocks, leave_out
from sparsellm_lightning.allocation.sensitivity import allocate
from sparsellm_lightning.allocation.shrinkage import choose_shrinkage

__all__ = ["allocate", "choose_blocks", "choose_shrinkage", "leave_out"]
