"""The stages of gradual pruning: optimizer step -> sparsity."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from sparsellm_lightning.callbacks.finetuning import AVERAGING
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError


def check_schedule(schedule: dict[int, float], config: PruningConfig, finetune: bool) -> dict[int, float]:
    """The stages in order.

    Raises:
        UserError: they do not begin at step 0, do not rise, or contradict other settings.
    """
    stages = {int(step): float(value) for step, value in sorted(schedule.items())}
    rising = all(low < high for low, high in pairwise(stages.values()))
    if not stages or next(iter(stages)) != 0 or not rising or not all(0 < value < 1 for value in stages.values()):
        raise UserError(
            f"schedule must begin at step 0 and rise within (0, 1), got {schedule}. Write {{0: 0.5, 50: 0.6, 100: 0.7}}."
        )
    if not finetune:
        raise UserError("schedule prunes during training, but finetune is false. Set finetune to true.")
    if config.pattern != "unstructured" or config.sparsity not in (None, list(stages.values())[-1]):
        raise UserError(
            f"schedule gives the sparsity of every stage and needs pattern unstructured, got sparsity {config.sparsity} and "
            f"pattern {config.pattern_name}. Leave both out."
        )
    return stages


def steps_of_run(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole run, as far as loaders and limits tell. Infinity if they do not."""
    with suppress(MisconfigurationException):  # the number of batches for a step changes from epoch to epoch
        steps = trainer.estimated_stepping_batches
        return steps if steps >= 0 else float("inf")
    return float("inf")


def warn_of_late_stages(trainer: pl.Trainer, schedule: dict[int, float]) -> None:
    """Name the stages that the run will not reach, as far as its loaders and limits say how many steps it takes."""
    if not trainer.lightning_module.automatic_optimization:  # global_step then counts the steps of every optimizer
        return
    steps = steps_of_run(trainer)
    late = [step for step in schedule if steps <= step]
    if late:
        rank_zero_warn(
            f"The run takes about {steps:.0f} steps, so that the schedule's stages at {', '.join(map(str, late))} do not come. "
            "Train longer, or prune earlier."
        )


def check_run(trainer: pl.Trainer, schedule: dict[int, float]) -> None:
    """Refuse a Trainer under which a schedule could not be followed.

    Raises:
        UserError: the run ends before the last stage, or averages weights.
    """
    last = list(schedule)[-1]
    if 0 < trainer.max_steps <= last:
        raise UserError(
            f"schedule has a stage at step {last}, but the run ends at max_steps {trainer.max_steps}. Train longer, or "
            "prune earlier."
        )
    if any(isinstance(callback, AVERAGING) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError(
            "Gradual pruning cannot be combined with weight averaging, because an average of weights before and after a "
            "stage is not sparse. Leave out schedule, or average in a second run (CausalLM(weights=...))."
        )
