"""Devices: where commands without a Trainer compute, and where nothing can be pruned."""

from __future__ import annotations

import torch
from torch import nn

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.runtime.memory import explaining_memory


def best_device() -> torch.device:
    """A CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_best_device(model: nn.Module) -> None:
    """Move a model to :func:`best_device`.

    Raises:
        OutOfMemoryError: it does not fit there.
    """
    with explaining_memory(lambda: "The model does not fit on the GPU. Set CUDA_VISIBLE_DEVICES= to use the CPU."):
        model.to(best_device())


def check_device(device: torch.device) -> None:
    """Refuse a device that has no float64, in which statistics are summed.

    Raises:
        UserError: an Apple GPU.
    """
    if device.type == "mps":
        raise UserError(
            "Pruning sums in float64, which Apple GPUs do not have, got device mps. Set trainer.accelerator to cpu, or "
            "without a Trainer move the model to the CPU."
        )
