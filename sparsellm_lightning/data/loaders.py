"""Dataloaders: windows as batches, a loader that resumes, and the loaders of a Trainer that calibrate and validate."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice, zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sparsellm_lightning.architecture import token_input
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import model_inputs
from sparsellm_lightning.solvers import IGNORED

Windows = DataLoader[dict[str, Tensor]]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Rows of an (N, T) tensor of token ids as model inputs.

    Args:
        windows: the tensor.
        ranks: that share the windows evenly. Rows are repeated without labels to make up the last share, where Lightning's
            sampler would repeat them with labels, and perplexity would count them twice.
    """

    def __init__(self, windows: Tensor, ranks: int = 1) -> None:
        self.windows = windows
        self.length = math.ceil(len(windows) / ranks) * ranks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index % len(self.windows)]
        labels = window if index < len(self.windows) else torch.full_like(window, IGNORED)
        return {"input_ids": window, "labels": labels}


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader whose position in the text is part of a checkpoint, by Lightning's protocol for stateful loaders.

    The loader counts epochs and batches itself, because Lightning's own count is one ahead in a checkpoint that is saved when
    ``max_steps`` ends a run. Each new iterator begins the next epoch. After :meth:`load_state_dict`, iterators continue at the
    loaded position until its epoch ends, because Lightning may then begin that epoch twice.

    Args:
        limit: batches of an epoch, or their share, as the Trainer's ``limit_train_batches``.
    """

    _epoch = 0
    _taken = 0
    _resumes = False

    def __init__(self, *args: Any, limit: int | float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    def __iter__(self) -> Any:
        if self._taken and not self._resumes:
            self._epoch, self._taken = self._epoch + 1, 0
        self._epoch, self._taken = self.state_dict().values()
        if isinstance(self.sampler, DistributedSampler):  # overfit_batches puts another in its place
            self.sampler.set_epoch(self._epoch)
        skipped = self._taken
        for index, batch in enumerate(super().__iter__()):
            if index >= skipped:
                self._taken = index + 1
                self._resumes = self._resumes and not self._is_over
                yield batch

    @property
    def _is_over(self) -> bool:
        """Whether all batches of this epoch are taken: an iterator of known length is not asked for one batch more."""
        batches = len(self)
        limit = int(self.limit * batches) if isinstance(self.limit, float) else self.limit
        return self._taken >= min(limit, batches)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were taken."""
        return {"epoch": self._epoch + self._is_over, "batches": 0 if self._is_over else self._taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration begins at this position."""
        self._epoch, self._taken, self._resumes = state_dict["epoch"], state_dict["batches"], True


def calibration_batches(trainer: pl.Trainer, num_samples: int, seed: int) -> tuple[Iterable[Any], bool, str]:
    """The batches that calibrate: of the datamodule's ``calibration_dataloader``, otherwise of the training dataloader.

    Args:
        trainer: whose training has started.
        num_samples, seed: passed to ``calibration_dataloader`` if it has these arguments.

    Returns:
        the batches; whether they hold this rank's share only; and their source for the report: the datamodule's ``source``
        (``self``: the model wrote them) or its type.
    """
    data = datamodule_of(trainer)
    loader = getattr(data, "calibration_dataloader", None)
    if loader is None:
        combined = trainer.fit_loop._combined_loader
        assert combined is not None
        fresh = [_own_windows(loader) for loader in combined.flattened]
        # Of several loaders batches in turn, so that each has its part.
        batches = fresh[0] if len(fresh) == 1 else (b for one in zip_longest(*fresh) for b in one if b is not None)
        return batches, _is_sharded(combined.flattened), "training dataloader"
    accepted = inspect.signature(loader).parameters
    wanted = {"num_samples": num_samples, "seed": seed}
    source = str(getattr(data, "calibration_text", type(data).__name__))
    takes_all = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    batches = loader(**{name: value for name, value in wanted.items() if takes_all or name in accepted})
    return _own_windows(batches), _is_sharded(batches), source


def validation_batches(trainer: pl.Trainer) -> tuple[Iterable[Any] | None, bool]:
    """The validation batches of this fit, or None, and whether they hold this rank's share only.

    At most ``limit_val_batches`` of the Trainer from each loader (over all ranks, which share a batch if the loader does
    not shard). 0, which turns off Lightning's own validation, limits nothing.
    """
    source: Any = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined():
        return None, False
    loaders = source.dataloader()
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    elif isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    elif not isinstance(loaders, (list, tuple)):
        loaders = [] if loaders is None else [loaders]
    limited = [_limited(loader, trainer.limit_val_batches) for loader in loaders]
    batches = limited[0] if len(limited) == 1 else chain.from_iterable(limited)
    return (batches if limited else None), _is_sharded(loaders)


def datamodule_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """The datamodule of this fit, if it has one. ``trainer.datamodule`` may be that of an earlier fit."""
    source = trainer.fit_loop._data_source.instance
    return source if isinstance(source, pl.LightningDataModule) else None


def _limited(loader: Any, limit: int | float | None) -> Iterable[Any]:
    """The first batches of a loader: a number (int), or a share (float). All, if that is 0 or 1.0."""
    if isinstance(limit, float):
        limit = max(int(limit * len(loader)), 1) if 0 < limit < 1 else None
    return islice(_fresh(loader), limit) if limit else _fresh(loader)


def _fresh(loader: Any) -> Iterable[Any]:
    return _Fresh(loader) if isinstance(loader, DataLoader) else loader


def _own_windows(loader: Any) -> Iterable[Any]:
    """The batches of a loader, without the windows that a distributed sampler repeats to make shares equal."""
    sampler = next((s for s in _samplers(loader) if isinstance(s, DistributedSampler)), None)
    if sampler is None or sampler.drop_last:
        return _fresh(loader)
    windows = range(sampler.rank, len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type]
    return _first_windows(_fresh(loader), len(windows))


def _first_windows(batches: Iterable[Any], count: int) -> Iterator[dict[str, Tensor]]:
    for inputs in map(model_inputs, batches):
        windows = len(token_input(inputs))
        yield {key: value[:count] if len(value) == windows else value for key, value in inputs.items()}
        count -= windows
        if count <= 0:
            return


class _Fresh:
    """The batches of a dataloader, without a trace in the loader.

    With persistent workers, ``iter(loader)`` restarts the one iterator that the loader keeps, and training uses that one. So
    each iteration has an iterator of its own. When it ends, the loader's random generators are put back where they were.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        fresh = copy.copy(self.loader)
        fresh._iterator = None
        if isinstance(fresh, ResumableLoader):
            fresh.load_state_dict({"epoch": 0, "batches": 0})
        owners = (fresh, *_samplers(fresh))
        generators = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
        states = [generator.get_state() for generator in generators]
        try:
            yield from fresh
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _samplers(loader: Any) -> tuple[Any, Any]:
    return getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)


def _is_sharded(loader: Any) -> bool:
    """Whether a dataloader gives each rank its own share, as Lightning's distributed sampler does."""
    if isinstance(loader, (list, tuple)):
        shares = {_is_sharded(part) for part in loader}
        if len(shares) > 1:
            raise UserError(
                "Several dataloaders must all give each rank its own share, or none, but only some have a DistributedSampler, "
                "such as those without an IterableDataset. Give loaders of one kind."
            )
        return shares == {True}
    return any(isinstance(sampler, DistributedSampler) for sampler in _samplers(loader))
