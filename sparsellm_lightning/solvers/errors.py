"""The error that solvers raise."""

from __future__ import annotations


class NumericalError(ValueError):
    """Weights, activations or statistics are not finite, or no reasonable damping makes a Gram matrix positive definite."""
