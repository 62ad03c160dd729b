"""The pruning pipeline: calibrate, solve, tune and advance, block by block."""

from sparsellm_lightning.pipeline.estimate import Estimate, estimate_work
from sparsellm_lightning.pipeline.prune import prune_model

__all__ = ["Estimate", "estimate_work", "prune_model"]
