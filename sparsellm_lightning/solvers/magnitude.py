"""Magnitude pruning: keep the largest weights."""

from __future__ import annotations

from torch import Tensor

from sparsellm_lightning.solvers.patterns import Pattern


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Zero the weights of smallest ``|W|``, one threshold for the whole matrix.

    Args:
        weight: (rows, columns) float32; this rank's rows.
        pattern: chooses the entries to keep. Its ``ranks`` hold the other rows.

    Returns:
        the pruned weight, a new tensor.
    """
    return weight * pattern.select(weight.abs())
