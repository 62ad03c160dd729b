"""A command that is killed or interrupted, in every phase: what was complete stays, and the same command goes on."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.cli import sparsellm
from support.interrupted import interrupt
from support.runs import assert_same_weights
from transformers import AutoModelForCausalLM

from sparsellm_lightning import verify_export
from sparsellm_lightning.models import REPORT_NAME

# Phase, and the entry at which the signal comes. One block enters several times.
PHASES = {
    "evaluation": 1,
    "generation": 1,
    "importance": 1,
    "allocation": 1,
    "forward": 40,
    "statistics": 30,
    "local_solve": 12,
    "alternation": 2,
    "reconstruction": 2,
    "distillation": 2,
    "export": 1,
}


def arguments(model: Path, sparsity: float = 0.6) -> list[str]:
    settings = {
        "model.pretrained": model,
        "data.source": "python-docs",
        "data.sequence_length": 64,
        "data.batch_size": 4,
        "data.max_eval_windows": 4,
        "pruner.preset": "best",
        "pruner.method": "sparsellm",
        "pruner.sparsity": sparsity,
        "pruner.num_calibration_samples": 12,
        "pruner.num_iterations": 2,
        "pruner.reconstruction_steps": 2,
        "pruner.distillation_steps": 4,
        "pruner.continuations": 1,
        "pruner.resume_dir": f"journal-{sparsity}",
        "pruner.export_dir": "out",
        "pruner.overwrite": "true",
        "trainer.logger": "false",
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
    }
    return ["prune", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def exports(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``earlier/out``, an export of 50 %, and ``whole/out``, that of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("exports")
    torch.set_num_threads(1)
    for name, sparsity in (("earlier", 0.5), ("whole", 0.6)):
        (folder / name).mkdir()
        run = sparsellm(*arguments(model_dir, sparsity), cwd=folder / name)
        assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture
def work(exports: Path, tmp_path: Path) -> Path:
    """A working folder that holds the earlier export."""
    return Path(shutil.copytree(exports / "earlier", tmp_path / "work"))


def goes_on(work: Path, exports: Path, model: Path) -> None:
    """The earlier export is whole, and the same command ends with the weights of a run that was not interrupted."""
    assert verify_export(work / "out") == []
    assert json.loads((work / "out" / REPORT_NAME).read_text())["sparsity"]["requested"] == 0.5
    run = sparsellm(*arguments(model), cwd=work)
    assert run.returncode == 0, run.stderr
    assert verify_export(work / "out") == []
    found, expected = (AutoModelForCausalLM.from_pretrained(at / "out") for at in (work, exports / "whole"))
    assert_same_weights(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed(work: Path, exports: Path, model_dir: Path, phase: str) -> None:
    run = interrupt(arguments(model_dir), work, phase, PHASES[phase], signal.SIGKILL)
    assert run.status == -signal.SIGKILL, run.errors
    goes_on(work, exports, model_dir)
    left = {path.name for path in work.iterdir()} - {"out", "journal-0.5", "journal-0.6", "errors.txt"}
    assert all(name.startswith(".out.") for name in left), "a killed export may leave its half-written folder"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["evaluation", "generation", "allocation", "forward", "reconstruction"])
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "ended by Ctrl-C"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_interrupted(
    work: Path, exports: Path, model_dir: Path, phase: str, number: signal.Signals, status: int, message: str
) -> None:
    run = interrupt(arguments(model_dir), work, phase, PHASES[phase], number)
    assert run.status == status, run.errors
    assert f"sparsellm: {message}" in run.errors
    assert f"Finished blocks are in {work / 'journal-0.6'}. Start the same command again to go on." in run.errors
    assert "Traceback" not in run.errors
    goes_on(work, exports, model_dir)
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_the_loader_hangs(work: Path, model_dir: Path, number: signal.Signals, status: int) -> None:
    run = interrupt(arguments(model_dir), work, "loader", 1, number)
    assert run.status == status, run.errors
    assert "sparsellm: ended by" in run.errors
    assert "Traceback" not in run.errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_interrupted_while_exporting(
    work: Path, exports: Path, model_dir: Path, number: signal.Signals, status: int
) -> None:
    """Ctrl-C leaves the earlier export. SIGTERM waits for the export, which takes seconds."""
    run = interrupt(arguments(model_dir), work, "export", 1, number)
    assert run.status == status, run.errors
    if status:
        goes_on(work, exports, model_dir)
    else:
        assert json.loads((work / "out" / REPORT_NAME).read_text())["sparsity"]["requested"] == 0.6
        assert verify_export(work / "out") == []


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    """The checkpoint before is whole, and a run resumed from it ends as one that was not killed."""
    steps = {
        "model.pretrained": model_dir,
        "data.source": "python-docs",
        "data.sequence_length": 64,
        "data.batch_size": 4,
        "data.max_train_windows": 32,
        "data.max_eval_windows": 4,
        "pruner.preset": "paper",
        "pruner.method": "wanda",
        "pruner.num_calibration_samples": 8,
        "pruner.finetune": "true",
        "pruner.export_dir": "out",
        "trainer.max_steps": 4,
        "trainer.logger": "false",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "lightning.pytorch.callbacks.ModelCheckpoint",
        "trainer.callbacks.dirpath": "checkpoints",
        "trainer.callbacks.filename": "{step}",
        "trainer.callbacks.every_n_train_steps": 1,
        "trainer.callbacks.save_top_k": -1,
    }
    command = ["fit", *(text for name, value in steps.items() for text in (f"--{name}", str(value)))]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert sparsellm(*command, cwd=tmp_path / "whole").returncode == 0
    run = interrupt(command, tmp_path / "killed", "checkpoint", 3, signal.SIGKILL)
    assert run.status == -signal.SIGKILL, run.errors
    checkpoints = sorted((tmp_path / "killed" / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in checkpoints] == ["step=1.ckpt", "step=2.ckpt"]
    for path in checkpoints:
        assert torch.load(path, weights_only=True)["state_dict"]
    resumed = sparsellm(*command, "--ckpt_path", checkpoints[-1], cwd=tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "out") for name in ("killed", "whole"))
    assert_same_weights(found, expected)
