"""The pruning pipeline: calibrate, solve, tune and advance, block by block."""

from sparsellm_lightning.pipeline.prune import prune_model

__all__ = ["prune_model"]
