"""What reaches a run while its model is pruned: SIGTERM, and calls that save a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM inside this context raises ``SIGTERMException``. Lightning's own handler waits for the end of a training batch.

    Outside the main thread, where Python runs no signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def forbid_checkpoints(trainer: pl.Trainer) -> None:
    """Keep the Trainer from saving checkpoints, until :func:`allow_checkpoints`.

    During pruning a checkpoint would hold a half pruned model. Lightning saves one when SLURM requeues the job, and resumes
    from it without being asked; a checkpoint callback may save one on an exception. Without a checkpoint the same command
    prunes from the start, and takes finished blocks from ``resume_dir``.
    """
    vars(trainer)["save_checkpoint"] = _save_nothing
    for callback in trainer.checkpoint_callbacks:  # or it would link last.ckpt to a checkpoint that was not saved
        vars(callback)["_should_save_on_exception"] = _save_nothing


def allow_checkpoints(trainer: pl.Trainer) -> None:
    """Undo :func:`forbid_checkpoints`."""
    vars(trainer).pop("save_checkpoint", None)
    for callback in trainer.checkpoint_callbacks:
        vars(callback).pop("_should_save_on_exception", None)


def _save_nothing(*_: Any, **__: Any) -> bool:
    log.warning("No checkpoint is saved before the model is pruned.")
    return False


def _end(signum: int, frame: FrameType | None) -> None:
    raise SIGTERMException(128 + signum)
