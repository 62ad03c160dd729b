"""The ``sparsellm`` command, inside this process and as a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from sparsellm_lightning.callbacks import SparseLLMCallback
from sparsellm_lightning.cli import PruningTrainer, SparseLLMCLI, main
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.models import CausalLM

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@dataclass
class Finished:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def sparsellm(*arguments: object, cwd: Path) -> Finished:
    """Run the command inside this process, which saves the seconds of the imports. An unexpected exception is raised."""
    before, out, errors = Path.cwd(), io.StringIO(), io.StringIO()
    code: object = 0
    os.chdir(cwd)
    try:
        with patch.object(sys, "argv", ["sparsellm"]), redirect_stdout(out), redirect_stderr(errors):
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    return Finished(code if isinstance(code, int) else int(code is not None), out.getvalue(), errors.getvalue())


def sparsellm_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "sparsellm_lightning", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def instantiate(*arguments: object) -> SparseLLMCLI:
    """Parse a command line and make its objects, without running the subcommand."""
    with patch.object(sys, "argv", ["sparsellm"]), patch.object(SparseLLMCLI, "_run_subcommand"):
        return SparseLLMCLI(
            *(CausalLM, TextDataModule),
            trainer_class=PruningTrainer,
            auto_configure_optimizers=False,
            save_config_callback=None,
            args=[str(argument) for argument in arguments],
            command=str(arguments[0]),
        )


def pruner_of(cli: SparseLLMCLI) -> SparseLLMCallback:
    """The pruning callback of a command line."""
    (pruner,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, SparseLLMCallback))
    return pruner
