"""Disks that are full or read-only, for real: a small tmpfs. Needs the right to mount, so it is skipped for most users."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.cli import Finished, sparsellm
from support.models import build_model

from sparsellm_lightning import PruningConfig, UserError, prune_model, verify_export
from sparsellm_lightning.models import REPORT_NAME

Remount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """A folder with 16 MB, and a function that mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    try:
        yield folder, remount
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            size = file.tell()
        file.truncate(size - leave)
    return path


def prune(model: Path, cwd: Path, **settings: Any) -> Finished:
    options = {
        "model.pretrained": model,
        "data.sequence_length": 64,
        "data.max_eval_windows": 4,
        "pruner.preset": "paper",
        "pruner.method": "wanda",
        "pruner.sparsity": 0.6,
        "pruner.num_calibration_samples": 8,
        "trainer.logger": "false",
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": "false",
        **{f"pruner.{name}": value for name, value in settings.items()},
    }
    return sparsellm("prune", *(text for name, value in options.items() for text in (f"--{name}", value)), cwd=cwd)


def sparsity(export: Path) -> float:
    requested: float = json.loads((export / REPORT_NAME).read_text())["sparsity"]["requested"]
    return requested


def test_an_export_to_a_full_disk(disk: tuple[Path, Remount], model_dir: Path, tmp_path: Path) -> None:
    """The earlier export stays. The model is saved elsewhere, and the message says where."""
    folder, _ = disk
    out = folder / "out"
    assert prune(model_dir, tmp_path, export_dir=out, sparsity=0.5).returncode == 0
    fill(folder, leave=64 * 1024)
    run = prune(model_dir, tmp_path, export_dir=out, overwrite="true")
    assert run.returncode == 1
    assert "could not be written" in run.stderr
    (rescued,) = tmp_path.glob("out-rescued-*")
    assert str(rescued.name) in run.stderr
    assert sparsity(rescued) == 0.6
    assert sparsity(out) == 0.5
    assert verify_export(rescued) == verify_export(out) == []
    assert {path.name for path in folder.iterdir()} == {"out", "filler"}, "nothing half-written is left"


def test_a_journal_on_a_full_disk(disk: tuple[Path, Remount]) -> None:
    folder, _ = disk
    config = PruningConfig(preset="paper", sparsity=0.6, num_iterations=2, num_calibration_samples=8)
    whole = build_model("llama")
    prune_model(whole, random_batches(), config)
    filler = fill(folder, leave=400 * 1024)  # two blocks
    with pytest.raises(UserError, match=r"resume_dir must be writable, but block-0000\d.*No space left on device"):
        prune_model(build_model("llama"), random_batches(), config, resume_dir=folder / "journal")
    kept = {path.name for path in (folder / "journal").glob("block-*")}
    assert len(kept) >= 1
    filler.unlink()
    again = build_model("llama")
    prune_model(again, random_batches(), config, resume_dir=folder / "journal")
    assert kept <= {path.name for path in (folder / "journal").glob("block-*")}
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_read_only_folders_are_refused_before_any_work(
    disk: tuple[Path, Remount], model_dir: Path, tmp_path: Path
) -> None:
    folder, remount = disk
    remount("ro")
    for setting in ("export_dir", "resume_dir"):
        run = prune(model_dir, tmp_path, **{setting: folder / "out"})
        assert run.returncode == 1
        assert f"sparsellm: error: {setting} must be writable" in run.stderr
        assert "Read-only file system" in run.stderr
    remount("rw")
    assert not list(folder.iterdir())
