"""Errors that a user's input can cause, apart from programming errors."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in configuration or data. The message gives the rule, the value found and the fix.

    The command line prints it without a traceback and exits with status 1.
    """


class NumericalError(UserError):
    """NaN or infinity in activations, or a Gram matrix that no reasonable damping makes positive definite."""


class MaskError(UserError):
    """A pruned weight came back, or a kept one went to zero, where the masks should have held."""


class OutOfMemoryError(UserError, MemoryError):
    """The device or the host has no room for a block's solve. The message names what was held and which argument lowers it."""
