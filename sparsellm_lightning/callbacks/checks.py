"""Refusals of runs in which the pruner would do nothing, or something other than its settings say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.lr_scheduler import OneCycleLR

from sparsellm_lightning.callbacks.distillation import Distillation
from sparsellm_lightning.callbacks.finetuning import SparseFinetuning
from sparsellm_lightning.callbacks.schedule import steps_of_run
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import datamodule_of
from sparsellm_lightning.distributed import failing_with_first
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.reporting import PruningReport
from sparsellm_lightning.runtime import check_device, claimed


def check_together(config: PruningConfig, measure: bool, baseline: bool, pack: bool, push_to_hub: str | None) -> None:
    """Refuse options of :class:`~sparsellm_lightning.SparseLLMCallback` that exclude each other.

    Raises:
        UserError: baseline without measure or with a structured pattern; pack with push_to_hub.
    """
    if baseline and (config.removes or not measure):
        raise UserError(
            "baseline compares perplexity with SparseGPT's, which makes zeros: it needs measure, and a pattern that is "
            f"unstructured or N:M, got measure {measure} and pattern {config.pattern_name}. Leave out baseline."
        )
    if pack and push_to_hub is not None:
        raise UserError(
            "pack writes files that load_model reads from a folder, not from the hub, but push_to_hub is set. Set pack to "
            "false, or leave push_to_hub out."
        )


def check_trainer(trainer: pl.Trainer, trains: bool, tunes: bool) -> None:
    """Refuse a Trainer under which pruning would not run, or which does not fit to what follows pruning.

    Args:
        trainer: of the run.
        trains: whether the run trains on after pruning.
        tunes: whether pruning takes gradients of the kept weights.

    Raises:
        UserError: a device that cannot prune; limits that allow no step; a minimum of steps, or a teacher, in a run that stops
            after pruning; two callbacks that hold zeros; DDP with ``static_graph``, which would record pruning's backward pass
            as training's.
    """
    check_device(trainer.strategy.root_device)
    if trainer.max_steps == 0 or trainer.max_epochs == 0 or trainer.limit_train_batches == 0:
        raise UserError(
            "SparseLLMCallback prunes when training starts, but nothing would run: max_steps, max_epochs and "
            f"limit_train_batches must not be 0, got {trainer.max_steps}, {trainer.max_epochs} and "
            f"{trainer.limit_train_batches}. To prune without training, leave them out and set finetune to false."
        )
    if not trains and (trainer.min_steps or trainer.min_epochs):
        raise UserError(
            "With finetune=False the run stops after pruning, but min_steps / min_epochs ask for "
            f"{trainer.min_steps} / {trainer.min_epochs}. Leave them out, or set finetune to true."
        )
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not trains and any(isinstance(callback, Distillation) for callback in callbacks):
        raise UserError(
            "Distillation teaches in training, but finetune=False ends the run after pruning. Set finetune to true, or leave "
            "Distillation out: in pruning, distillation_steps distil."
        )
    if sum(isinstance(callback, SparseFinetuning) for callback in callbacks) > 1:
        raise UserError(
            "SparseLLMCallback keeps the zeros itself, but the Trainer has another SparseFinetuning or SparseLLMCallback. "
            "Keep one. With SparseLLMCallback, set finetune to true."
        )
    static = getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph", False)
    if static and trains and tunes:
        raise UserError(
            "DDP with static_graph expects every backward pass to match the first, but the first ones here belong to pruning. "
            "Leave static_graph out, or set reconstruction_steps and distillation_steps to 0."
        )
    tell = getattr(datamodule_of(trainer), "check_training" if trains else "without_training", None)
    if tell is not None:
        tell()


def check_launcher(trainer: pl.Trainer, module: pl.LightningModule, export_dir: str | None) -> None:
    """Refuse a run in processes that Lightning spawns or forks, if the pruned model would be lost when these processes end.

    Lightning copies weights back into the module of the main process, but only parameters that this module has already.
    ``configure_model`` makes them in the other processes only.

    Raises:
        UserError: spawned or forked processes, no export_dir, and a module with ``configure_model``.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) or trainer.world_size == 1:
        return
    rank_zero_warn(
        "The report stays in the processes that Lightning spawns or forks. Read it from the files in export_dir."
    )
    if export_dir is None and is_overridden("configure_model", module):
        raise UserError(
            "Processes that Lightning spawns or forks would end with the pruned model in them. Set export_dir, run a script "
            "with strategy ddp, or use one device."
        )


def check_folders_apart(trainer: pl.Trainer, export_dir: str, resume_dir: str | None) -> None:
    """Refuse a journal, checkpoints or logs inside the export folder, which an export replaces as a whole.

    Raises:
        UserError: a folder inside export_dir.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    folders: list[tuple[str, Any]] = [("resume_dir", resume_dir)]
    folders += [(f"{type(c).__name__}.dirpath", getattr(c, "dirpath", None)) for c in callbacks]
    folders += [(f"{type(logger).__name__}.log_dir", logger.log_dir or logger.save_dir) for logger in trainer.loggers]
    nowhere = all(logger.save_dir is None for logger in trainer.loggers[:1])  # no logger has a folder for checkpoints
    if nowhere and any(isinstance(c, ModelCheckpoint) and c.dirpath is None for c in callbacks):
        name = "" if trainer.loggers else "checkpoints"  # with a logger, the folders inside have its names
        folders.append(("ModelCheckpoint.dirpath", Path(trainer.default_root_dir) / name))
    for name, folder in folders:
        if folder is not None and Path(folder).resolve().is_relative_to(Path(export_dir).resolve()):
            raise UserError(
                f"{name} must not lie inside export_dir {export_dir}, got {folder}. Choose a folder beside it."
            )


def check_resume_dir(trainer: pl.Trainer, resume_dir: str) -> None:
    """Refuse a folder for finished blocks before any work. All ranks call this together.

    Raises:
        UserError: it cannot be written, or another run uses it.
    """
    with failing_with_first(trainer):
        if trainer.is_global_zero:
            with claimed(Path(resume_dir) / "stage-0", "resume_dir"):
                pass


def check_resumed(report: PruningReport, config: PruningConfig) -> None:
    """Refuse settings that ask for another sparsity than the one that the model has been pruned to.

    Raises:
        UserError: another sparsity or pattern.
    """
    if not report.config:
        return
    done, asked = report.sparsity["requested"], config.requested_sparsity
    if abs(done - asked) > 1e-6 or report.pattern != config.pattern_name:
        raise UserError(
            f"This run resumes one that has pruned to {done:g} ({report.pattern}), but the settings ask for {asked:g} "
            f"({config.pattern_name}). Restore the settings, or start a new run without ckpt_path."
        )


def check_read_again(trainer: pl.Trainer, reader: str) -> None:
    """Refuse to calibrate on a training loader that can be read once, if something else reads it too.

    Args:
        trainer: of the run.
        reader: what reads it too, for the message.

    Raises:
        UserError: such a loader.
    """
    loaders = trainer.fit_loop._combined_loader
    apart = hasattr(datamodule_of(trainer), "calibration_dataloader")
    if loaders is not None and not apart and any(isinstance(loader, Iterator) for loader in loaders.flattened):
        raise UserError(
            f"Calibration and {reader} both read the training dataloader, but it is an iterator, which can be read once. Give "
            "a DataLoader, or a datamodule with a calibration_dataloader."
        )


def check_learning_rate(trainer: pl.Trainer) -> None:
    """Refuse training that would fail after pruning.

    Raises:
        UserError: a learning rate that is planned for fewer steps than the run takes.
    """
    if not trainer.lightning_module.automatic_optimization:  # the module steps its schedulers itself
        return
    steps = steps_of_run(trainer)
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, OneCycleLR) or config.interval != "step":
            continue
        if scheduler.total_steps < steps // config.frequency < float("inf"):
            raise UserError(
                f"OneCycleLR plans total_steps {scheduler.total_steps}, but the run steps it {steps // config.frequency:.0f} "
                "times: torch would raise when total_steps is exceeded. Raise total_steps to that number, or shorten the run."
            )
