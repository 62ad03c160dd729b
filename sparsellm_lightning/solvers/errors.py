"""The error that solvers raise."""

from __future__ import annotations


class NumericalError(ValueError):
    """Activations or statistics hold NaN or infinity, or no reasonable damping makes a Gram matrix positive definite."""
