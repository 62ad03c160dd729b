"""A command that is interrupted in a given phase: a process forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from support.pool import IMPORTED_ONCE


@dataclass
class Interrupted:
    """How the process ended.

    Attributes:
        status: exit status, negative for a signal.
        errors: what it wrote to stderr.
    """

    status: int
    errors: str


def interrupt(arguments: list[str], cwd: Path, phase: str, entry: int, number: signal.Signals) -> Interrupted:
    """Run ``sparsellm ARGUMENTS`` and send a signal to its process when a phase is entered for the ``entry``-th time.

    Besides the phases of the report, ``export`` is the moment between the weights and the report, ``checkpoint`` the middle of
    writing one, and ``loader`` a calibration loader that has hung for half a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED_ONCE, "sparsellm_lightning.cli"])
    errors = cwd / "errors.txt"
    process = context.Process(target=_run, args=(arguments, cwd, phase, entry, int(number), errors))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{phase}: the process went on for 120 seconds. {errors.read_text()[-2000:]}")
    assert process.exitcode is not None
    return Interrupted(process.exitcode, errors.read_text())


def _run(arguments: list[str], cwd: Path, phase: str, entry: int, number: int, errors: Path) -> None:
    import torch
    from fsspec.implementations.local import LocalFileOpener
    from transformers import PreTrainedModel

    from sparsellm_lightning.cli import main
    from sparsellm_lightning.data import TextDataModule
    from sparsellm_lightning.runtime import Profile

    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The server ignores Ctrl-C, and so would its forks.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    phase_of, save, write, entries = Profile.phase, PreTrainedModel.save_pretrained, LocalFileOpener.write, 0

    def interrupt_at(name: str) -> None:
        nonlocal entries
        entries += name == phase
        if name == phase and entries == entry:
            os.kill(os.getpid(), number)

    @contextmanager
    def phase_interrupted(profile: Profile, name: str) -> Iterator[None]:
        with phase_of(profile, name):
            interrupt_at(name)
            yield

    def export_interrupted(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        save(model, *args, **kwargs)
        interrupt_at("export")  # behind the weights, in front of the report

    def checkpoint_interrupted(file: LocalFileOpener, data: bytes) -> int:
        write(file, data[: len(data) // 2])
        interrupt_at("checkpoint")
        return write(file, data[len(data) // 2 :])

    def hanging(*args: Any, **kwargs: Any) -> Iterator[Any]:
        threading.Timer(0.5, interrupt_at, ["loader"]).start()
        time.sleep(600)
        yield

    if phase == "loader":
        TextDataModule.calibration_dataloader = hanging  # type: ignore[method-assign]
    with (
        mock.patch.object(LocalFileOpener, "write", checkpoint_interrupted),
        mock.patch.object(Profile, "phase", phase_interrupted),
        mock.patch.object(PreTrainedModel, "save_pretrained", export_interrupted),
        mock.patch.object(sys, "argv", ["sparsellm"]),
    ):
        main(arguments)
