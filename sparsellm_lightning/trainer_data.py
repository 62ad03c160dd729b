"""Which batches of a Trainer to calibrate on, and which to validate on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DistributedSampler


def calibration_batches(trainer: pl.Trainer, num_samples: int, seed: int) -> tuple[Iterable[Any], bool, str]:
    """The calibration batches: of the datamodule's ``calibration_dataloader``, else of the training dataloader.

    Args:
        trainer: when training starts.
        num_samples, seed: given to ``calibration_dataloader`` where it takes them.

    Returns:
        the batches; whether each rank's hold only its own share; and what they come from, for the report: the datamodule's
        ``source`` (``self``: the model wrote them), or its type.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    loader = getattr(data, "calibration_dataloader", None)
    if loader is None:
        assert trainer.train_dataloader is not None
        return trainer.train_dataloader, _is_sharded(trainer.train_dataloader), "training dataloader"
    accepted = inspect.signature(loader).parameters
    wanted = {"num_samples": num_samples, "seed": seed}
    source = str(getattr(data, "source", type(data).__name__))
    return loader(**{name: value for name, value in wanted.items() if name in accepted}), False, source


def validation_batches(trainer: pl.Trainer) -> tuple[Iterable[Any] | None, bool]:
    """The validation batches, if there are any, and whether each rank's loader holds only its own share."""
    for owner in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        if owner is not None and is_overridden("val_dataloader", owner):
            loaders, sharded = owner.val_dataloader(), False
            break
    else:
        loaders = trainer.val_dataloaders
        sharded = _is_sharded(loaders)
    if isinstance(loaders, (list, tuple)):
        return (chain.from_iterable(loaders), sharded) if loaders else (None, sharded)
    return loaders, sharded


def _is_sharded(loader: Any) -> bool:
    """Whether a dataloader gives each rank its own share, as Lightning's distributed sampler makes it do."""
    if isinstance(loader, (list, tuple)):
        return any(_is_sharded(part) for part in loader)
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)
