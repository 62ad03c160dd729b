"""Loaders: one for calibration has an iterator of its own, so that training keeps its place. Epochs, limits, arguments."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.training import trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from sparsellm_lightning import CausalLM, TextDataModule, UserError
from sparsellm_lightning.data.loaders import (
    ResumableLoader,
    WindowDataset,
    _Fresh,
    _is_sharded,
    _own_windows,
    calibration_batches,
)


def rows(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["plain", "persistent"])
def test_a_fresh_loader_leaves_the_training_iterator_alone(settings: dict[str, Any]) -> None:
    loader: DataLoader[Tensor] = DataLoader(torch.arange(12), batch_size=3, **settings)
    training = iter(loader)
    first = next(training)
    fresh = _Fresh(loader)
    assert rows(fresh) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert first.tolist() == [0, 1, 2]
    assert rows(training) == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    if settings:
        assert loader._iterator is training


def test_a_fresh_loader_begins_at_the_first_window() -> None:
    dataset = WindowDataset(torch.arange(12)[:, None])
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, 1, 0, shuffle=True, seed=0)
    loader = ResumableLoader(dataset, 3, sampler=sampler)
    whole = [batch["input_ids"].tolist() for batch in loader]
    loader.load_state_dict({"epoch": 0, "batches": 2})
    assert [batch["input_ids"].tolist() for batch in _Fresh(loader)] == whole
    assert loader.state_dict() == {"epoch": 0, "batches": 2}
    assert [batch["input_ids"].tolist() for batch in loader] == whole[2:]


def test_only_a_loaded_position_is_gone_on_from() -> None:
    """A limit that the loader does not know breaks an epoch off, and the next one follows."""
    dataset = WindowDataset(torch.arange(12)[:, None])
    loader = ResumableLoader(dataset, 3, sampler=DistributedSampler(dataset, 1, 0, shuffle=True, seed=0))

    def epoch(first: int = 0, number: int = 4) -> list[Any]:
        return [batch["input_ids"].tolist() for batch in islice(loader, number)][first:]

    zero, one = epoch(number=2), epoch(number=2)
    assert zero != one
    loader.load_state_dict({"epoch": 0, "batches": 1})
    assert epoch(number=1) == zero[1:]
    assert len(epoch()) == 2, "the epoch of a loaded position goes on, also if it is begun twice"
    assert epoch()[:2] == one


def _fit_with(calibration_dataloader: Any) -> Any:
    """What calibration sees of a Trainer whose datamodule has this method."""
    data = pl.LightningDataModule()
    data.calibration_dataloader = calibration_dataloader  # type: ignore[attr-defined]
    return SimpleNamespace(fit_loop=SimpleNamespace(_data_source=SimpleNamespace(instance=data)))


@pytest.mark.parametrize(("ranks", "windows"), [(3, 4), (2, 7), (5, 2)])
def test_repeated_windows_of_a_distributed_sampler_do_not_calibrate(ranks: int, windows: int) -> None:
    dataset = torch.arange(windows)[:, None]
    seen = []
    for rank in range(ranks):
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks, rank, shuffle=True)  # type: ignore[arg-type]
        loader: DataLoader[Tensor] = DataLoader(dataset, batch_size=2, sampler=sampler)  # type: ignore[arg-type]
        for batches in (_own_windows(loader), calibration_batches(_fit_with(lambda made=loader: made), 8, 0)[0]):
            seen += [row for batch in batches for row in batch["input_ids"].flatten().tolist()]
    assert sorted(seen) == sorted(2 * list(range(windows)))


def test_loaders_of_two_kinds_are_refused() -> None:
    dataset = torch.arange(4)[:, None]
    sharded: DataLoader[Tensor] = DataLoader(dataset, sampler=DistributedSampler(dataset, 2, 0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must all give each rank its own share"):
        _is_sharded([sharded, DataLoader(dataset)])  # type: ignore[arg-type]


@pytest.mark.parametrize("taken", [1, 4], ids=["broken off", "to the end"])
def test_a_fresh_loader_leaves_the_random_generator_alone(taken: int) -> None:
    generator = torch.Generator().manual_seed(5)
    loader: DataLoader[Tensor] = DataLoader(torch.arange(12), batch_size=3, shuffle=True, generator=generator)
    before = generator.get_state()
    for _, _batch in zip(range(taken), _Fresh(loader), strict=False):
        pass
    assert torch.equal(generator.get_state(), before)


def test_loaders_that_are_made_anew_each_epoch_differ(model_dir: Path) -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.seen.append(batch["input_ids"].flatten().tolist())

    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=12, max_eval_windows=4)
    watches = []
    for every in (0, 1):
        watches.append(Watch())
        run = trainer(watches[-1], max_epochs=3, reload_dataloaders_every_n_epochs=every, limit_val_batches=0)
        run.fit(CausalLM(str(model_dir)), data)
    assert watches[0].seen == watches[1].seen
    assert len({tuple(window) for window in watches[1].seen}) == 3


def test_a_calibration_dataloader_that_takes_anything_gets_both_arguments() -> None:
    batches, _, _ = calibration_batches(_fit_with(lambda **kwargs: [kwargs]), 3, 5)
    assert list(batches) == [{"num_samples": 3, "seed": 5}]


@pytest.mark.parametrize("limit", [2, 0.5], ids=["number", "share"])
def test_epochs_that_the_trainer_cuts(limit: int | float) -> None:
    """Every epoch begins anew, also after a checkpoint at the end of one."""
    dataset = WindowDataset(torch.arange(12)[:, None])
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, 1, 0, shuffle=True, seed=0)
    loader = ResumableLoader(dataset, 3, sampler=sampler, limit=limit)
    epochs = []
    for epoch in range(3):
        epochs.append([batch["input_ids"].flatten().tolist() for _, batch in zip(range(2), loader, strict=False)])
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert epochs[-1] == [order[:3], order[3:6]]
        assert loader.state_dict() == {"epoch": epoch + 1, "batches": 0}
    again = ResumableLoader(dataset, 3, sampler=sampler, limit=limit)
    again.load_state_dict({"epoch": 1, "batches": 0})
    assert next(iter(again))["input_ids"].flatten().tolist() == epochs[1][0]
