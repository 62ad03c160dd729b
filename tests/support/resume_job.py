"""A fine-tuning run that a test kills: as a process, or inside the test's process by :func:`run`.

    python resume_job.py OPTIONS.json [save RESULT.pt]

The run prints one line for every iteration of every solve and for every optimizer step. At the line that the options name it
sleeps, so that the test kills it exactly there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sparsellm_lightning import CausalLM, SparseLLMCallback, TextDataModule
from sparsellm_lightning.callbacks import reports


class Progress(pl.Callback):
    """Prints every optimizer step before it is taken."""

    def __init__(self, stop_at: str | None) -> None:
        self.stop_at = stop_at
        self.solves = -1

    def note(self, line: str) -> None:
        print(line, flush=True)
        if line == self.stop_at:
            time.sleep(600)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note(f"step {trainer.global_step}")


class Noted(SparseLLMCallback):
    """Prints the iterations of its solves."""

    progress: Progress

    def _prune(self, *args: Any) -> None:
        self.progress.solves += 1

        def note(block: int, iteration: int, error: float) -> None:
            self.progress.note(f"solve {self.progress.solves} block {block} iteration {iteration}")

        with mock.patch.object(reports, "prune_model", partial(reports.prune_model, on_iteration=note)):
            super()._prune(*args)


def run(model: str, folder: str, stop_at: str | None = None) -> tuple[pl.Trainer, CausalLM, list[str]]:
    """Prune in two stages and train. A checkpoint in the folder is resumed.

    Returns:
        the Trainer, the module and, without ``stop_at``, the printed lines.
    """
    progress = Progress(stop_at)
    lines: list[str] = []
    if stop_at is None:
        progress.note = lines.append  # type: ignore[method-assign, assignment]
    pl.seed_everything(0, verbose=False)
    module = CausalLM(model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    held = Noted(
        preset="paper",
        schedule={0: 0.5, 5: 0.7},
        finetune=True,
        num_calibration_samples=8,
        num_iterations=2,
        measure=False,
    )
    held.progress = progress
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_steps=10,
        callbacks=[progress, held, ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)],
    )
    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=16)
    trainer.fit(module, data, ckpt_path="last")
    return trainer, module, lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(Path(sys.argv[1]).read_text())
    finished, trained, _ = run(**options)
    if "save" in sys.argv[2:]:
        torch.save((trained.state_dict(), finished.optimizers[0].state_dict()), sys.argv[3])
