"""How a sparsity is divided over the projections of a model."""

from sparsellm_lightning.allocation.sensitivity import allocate

__all__ = ["allocate"]
