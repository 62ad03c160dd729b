"""A run that is killed and started again ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.config import Reconstruction
from sparsellm_lightning.reporting import PruningReport

CONFIG = PruningConfig(preset="paper", sparsity=0.7, num_iterations=2, num_calibration_samples=16)
TUNED = Reconstruction(steps=4, batch_tokens=512, learning_rate=2e-3)


class Killed(Exception):
    pass


def prune(
    model: PreTrainedModel, batches: Any, folder: Path | None, config: PruningConfig = CONFIG, stop: int | None = None
) -> tuple[PruningReport, int]:
    """Prune; stopped at the so-manieth iteration of an alternation, if asked. The report, and how many there were."""
    seen = 0

    def on_iteration(block: int, iteration: int, error: float) -> None:
        nonlocal seen
        if seen == stop:
            raise Killed
        seen += 1

    return prune_model(model, batches, config, resume_dir=folder, on_iteration=on_iteration), seen


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"target": "model", "ignore": ("up_proj",)}),
        ("opt", {"pattern": "2:4", "sparsity": None}),
        ("opt-350m", {}),
        ("gpt2", {"alternation_blocks": [1]}),
        ("llama", {"reconstruct": TUNED, "target": "model", "ignore": ("*.1.*",)}),
        ("opt-350m", {"reconstruct": TUNED}),
        ("gpt2", {"reconstruct": TUNED, "method": "sparsegpt", "allocation": "kl"}),
    ],
)
def test_stopped_anywhere(tmp_path: Path, trained, calibration, name: str, settings: dict[str, Any]) -> None:
    config = PruningConfig(**{**vars(CONFIG), **settings})
    whole = trained(name)
    report, iterations = prune(whole, calibration, None, config)
    if config.reconstruct:
        changed = [
            n for (n, w), d in zip(whole.named_parameters(), trained(name).parameters(), strict=True) if (w != d).any()
        ]
        assert any("norm" in n or "ln_" in n for n in changed), "what the journal must hold besides projections"
    a_block = 3 if config.reconstruct else 2  # two iterations, and what reconstruction made of them
    for stop in range(0, iterations, 2):
        folder = tmp_path / str(stop)
        with pytest.raises(Killed):
            prune(trained(name), calibration, folder, config, stop)
        again = trained(name)
        resumed, after = prune(again, calibration, folder, config)
        assert_same(again, whole)
        assert after <= iterations - a_block * (stop // a_block) or name == "gpt2", (
            "finished blocks are not solved again"
        )
        for key in ("errors", "held_out_errors", "reconstruction"):
            assert [b[key] for b in resumed.blocks] == [b[key] for b in report.blocks]
        assert [layer["error"] for layer in resumed.layers] == [layer["error"] for layer in report.layers]
    finished = trained(name)
    assert prune(finished, calibration, tmp_path / "0", config)[1] == 0
    assert_same(finished, whole)


def test_another_run_is_refused(tmp_path: Path, trained, calibration) -> None:
    prune(trained("llama"), calibration, tmp_path)
    with pytest.raises(UserError, match=r"config.sparsity: 0.7 there, 0.6 here. Choose"):
        prune(trained("llama"), calibration, tmp_path, PruningConfig(**{**vars(CONFIG), "sparsity": 0.6}))
    with pytest.raises(
        UserError, match=r"config.reconstruct: False there.*config.reconstruct.steps: None there, 4 here"
    ):
        prune(trained("llama"), calibration, tmp_path, PruningConfig(**{**vars(CONFIG), "reconstruct": TUNED}))
    with pytest.raises(UserError, match="windows:"):
        prune(trained("llama"), calibration[1:], tmp_path)
    other = trained("llama")
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(UserError, match=r"model.weights:"):
        prune(other, calibration, tmp_path)


def test_damaged_and_half_written_files(tmp_path: Path, trained, calibration) -> None:
    whole = trained("llama")
    prune(whole, calibration, tmp_path)
    first, second, third = sorted(tmp_path.glob("block-*"))
    damaged = bytearray(second.read_bytes())
    damaged[-3] ^= 1
    second.write_bytes(damaged)
    third.unlink()
    (tmp_path / f".{third.name}.partial").write_bytes(b"half")
    again = trained("llama")
    with pytest.warns(UserWarning, match="damaged"):
        assert prune(again, calibration, tmp_path)[1] == 4, "two blocks of two iterations"
    assert_same(again, whole)
    assert first.exists()


def test_written_windows_are_noted(tmp_path: Path, trained, calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that would write other windows goes on with those of the one that began."""
    config = PruningConfig(**{**vars(CONFIG), "continuations": 1})
    whole = trained("llama")
    prune(whole, calibration, None, config)
    with pytest.raises(Killed):
        prune(trained("llama"), calibration, tmp_path, config, 3)
    rounding = "sparsellm_lightning.pruning.rewrite_windows"
    monkeypatch.setattr(rounding, lambda model, ids, *others: ids.flip(1))
    again = trained("llama")
    report, _ = prune(again, calibration, tmp_path, config)
    assert_same(again, whole)
    assert report.calibration["written"] == 14
    (file,) = tmp_path.glob("written-windows-*")
    file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="damaged; written-windows is done again"):
        prune(trained("llama"), calibration, tmp_path, config)
    assert list(tmp_path.glob("written-windows-*")) != [file], "what was done again is noted"


def test_killed_five_times(tmp_path: Path, model_dir: Path) -> None:
    """The command line, killed dead at random moments, and started again each time."""

    def command(out: str, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "sparsellm_lightning", "prune", "--model.pretrained", str(model_dir)),
            *("--data.sequence_length", "64", "--data.batch_size", "4", "--data.max_eval_windows", "4"),
            *("--pruner.sparsity", "0.7", "--pruner.num_calibration_samples", "64", "--pruner.measure", "false"),
            *("--pruner.num_iterations", "30", "--pruner.export_dir", str(tmp_path / out), "--trainer.logger", "false"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_checkpointing", "false", *more),
        ]

    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    journal = tmp_path / "journal"
    start = time.monotonic()
    subprocess.run(command("whole"), check=True, timeout=300, **options)
    longest = time.monotonic() - start
    journalled = command("killed", "--pruner.resume_dir", str(journal))
    rng = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(journalled, **options)
        time.sleep(rng.uniform(0.4, 1.0) * longest)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*journalled, "--pruner.overwrite", "true"], check=True, timeout=300, **options)
    whole, killed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert_same(killed, whole)
    assert len(list((journal / "stage-0").glob("block-*"))) == 3
