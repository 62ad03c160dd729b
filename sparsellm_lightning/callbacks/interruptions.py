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
    """From now on the Trainer saves no checkpoints, until :func:`allow_checkpoints`.

    Lightning saves one when SLURM requeues a job, or when a callback for exceptions asks for it, and then resumes from it
    unasked. It would hold a half pruned model. Without it the same command starts anew, and finds finished blocks in
    ``resume_dir``.
    """
    vars(trainer)["save_checkpoint"] = _save_nothing
    for callback in trainer.checkpoint_callbacks:  # which would take the checkpoint for saved, and link to it
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
