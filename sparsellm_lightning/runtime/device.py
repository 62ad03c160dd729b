"""Devices: the one of commands that have no Trainer, and those on which nothing can be pruned."""

from __future__ import annotations

import torch

from sparsellm_lightning.errors import UserError


def best_device() -> torch.device:
    """A CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: torch.device) -> None:
    """Refuse a device that has no float64, in which statistics are summed.

    Raises:
        UserError: an Apple GPU.
    """
    if device.type == "mps":
        raise UserError(
            "Pruning sums in float64, which Apple GPUs do not have, got device mps. Set accelerator to cpu."
        )
