"""What the Trainer's loggers get: the settings, each block's figures, and the run's."""

from __future__ import annotations

from dataclasses import asdict

import lightning.pytorch as pl
import torch

from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.reporting import BlockResult, PruningReport


def log_settings(trainer: pl.Trainer, config: PruningConfig) -> None:
    """The settings, as hyperparameters under ``pruner``."""
    for logger in trainer.loggers:
        logger.log_hyperparams({"pruner": asdict(config) | {"ignore": list(config.ignore)}})


def log_block(trainer: pl.Trainer, result: BlockResult) -> None:
    """A finished block's figures. Its index is the step."""
    for logger in trainer.loggers:
        logger.log_metrics({f"prune/{name}": value for name, value in result.metrics().items()}, step=result.index)


def log_results(trainer: pl.Trainer, report: PruningReport) -> None:
    """The run's figures, for loggers, and for sweeps in ``trainer.callback_metrics``."""
    metrics = {f"prune/{name}": value for name, value in report.metrics().items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
