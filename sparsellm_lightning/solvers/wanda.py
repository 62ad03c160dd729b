"""Wanda (Sun et al., arXiv 2306.11695): magnitude times the norm of the input feature."""

from __future__ import annotations

from torch import Tensor

from sparsellm_lightning.solvers.patterns import Pattern


def wanda(weight: Tensor, gram: Tensor, pattern: Pattern) -> Tensor:
    """Zero the weights of smallest ``|W_ij| · ‖X_j‖₂`` in every output row (section 3 of the paper). No weight update.

    Args:
        weight: (rows, columns) float32; this rank's rows.
        gram: ``XᵀX / n``, (columns, columns) float32.
        pattern: chooses the entries to keep.

    Returns:
        the pruned weight, a new tensor.
    """
    return weight * pattern.select(weight.abs() * gram.diagonal().clamp(min=0).sqrt(), per_row=True)
