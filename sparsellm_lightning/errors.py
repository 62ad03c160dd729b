"""Errors that a user's input can cause, apart from programming errors."""

from __future__ import annotations

from sparsellm_lightning.solvers import NumericalError

__all__ = ["MaskError", "NumericalError", "OutOfMemoryError", "UserError"]


class UserError(ValueError):
    """A mistake in configuration or data. The message gives the rule, the value found and the fix.

    The command line prints it without a traceback and exits with status 1.
    """


class MaskError(UserError):
    """A pruned weight is no longer zero, or a kept weight became zero, although the masks were held."""


class OutOfMemoryError(UserError, MemoryError):
    """The device or the host has no room. The message names the tensors and the settings that reduce them."""
