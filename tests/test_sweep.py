"""A sweep's figures are those of single runs, and it goes on where it stopped."""

from __future__ import annotations

import csv
import math
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.cli import sparsellm

from sparsellm_lightning import PruningConfig, TextDataModule, UserError, load_model, perplexity, prune_model
from sparsellm_lightning import sweep as module
from sparsellm_lightning.sweep import sweep

SETTINGS = {"num_calibration_samples": 8}


def text(model_dir: Path) -> TextDataModule:
    return TextDataModule("python-docs", sequence_length=64, max_eval_windows=8, tokenizer=str(model_dir))


def test_rows_are_those_of_single_runs(tmp_path: Path, model_dir: Path) -> None:
    out = tmp_path / "sweep"
    rows = sweep(str(model_dir), [0.7, 0.5], ["sparsegpt", "paper"], str(out), text(model_dir), SETTINGS)
    assert [(row.variant, row.sparsity) for row in rows] == [
        ("dense", 0.0),
        ("sparsegpt", 0.7),
        ("sparsegpt", 0.5),
        ("paper", 0.7),
        ("paper", 0.5),
    ]
    model, data = load_model(str(model_dir)).eval(), text(model_dir)
    assert rows[0].perplexity == pytest.approx(perplexity(model, data.val_dataloader()))
    prune_model(model, data.calibration_dataloader(8, 0), PruningConfig(preset="paper", sparsity=0.5, **SETTINGS))  # type: ignore[arg-type]
    assert rows[-1].perplexity == pytest.approx(perplexity(model, data.val_dataloader()), rel=1e-5)
    assert all(row.achieved == pytest.approx(row.sparsity, abs=0.01) and row.seconds > 0 for row in rows[1:])
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    written = {(row["variant"], float(row["sparsity"])): float(row["perplexity"]) for row in lines}
    assert written == {(row.variant, row.sparsity): row.perplexity for row in rows}
    dense, sparsegpt, paper = rows[0].perplexity, rows[2].perplexity, rows[4].perplexity
    assert rows[4].r == pytest.approx(math.log(paper / dense) / math.log(sparsegpt / dense))
    assert float(lines[4]["r"]) == rows[4].r
    assert ">nan<" not in (out / "sweep.html").read_text()  # pictures are base64, which may spell anything
    assert {path.name for path in out.iterdir()} == {"sweep.csv", "sweep.html", "sweep.json", "sweep.png"}


def test_goes_on_where_it_stopped(tmp_path: Path, model_dir: Path) -> None:
    runs: list[float] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(args[2].sparsity)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return prune_model(*args, **kwargs)

    with mock.patch.object(module, "prune_model", counted):
        with pytest.raises(KeyboardInterrupt):
            sweep(str(model_dir), [0.5, 0.6, 0.7], ["wanda"], str(tmp_path), text(model_dir), SETTINGS)
        sweep(str(model_dir), [0.5, 0.6, 0.7], ["wanda"], str(tmp_path), text(model_dir), SETTINGS)
    assert runs == [0.5, 0.6, 0.6, 0.7]
    with pytest.raises(UserError, match="of another model, text, settings"):
        sweep(str(model_dir), [0.5], ["wanda"], str(tmp_path), text(model_dir), {"num_calibration_samples": 9})
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(UserError, match=r"sweep\.json is missing"):
        sweep(str(model_dir), [0.5], ["wanda"], str(tmp_path), text(model_dir), SETTINGS)


def test_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="variants must be presets or methods, got fst"):
        sweep("no-such-model", [0.5], ["fst"], str(tmp_path / "out"))
    with pytest.raises(UserError, match="settings must be those of the pruner, got baseline, windows"):
        sweep("no-such-model", [0.5], ["fast"], str(tmp_path / "out"), settings={"windows": 8, "baseline": True})
    with pytest.raises(UserError, match=r"penalties\.beta must be positive"):
        sweep("no-such-model", [0.5], ["fast"], str(tmp_path / "out"), settings={"penalties": {"beta": -1.0}})
    with pytest.raises(UserError, match="windows of source self are written in a Trainer's fit"):
        sweep("no-such-model", [0.5], ["fast"], str(tmp_path / "out"), TextDataModule("self"))
    with pytest.raises(UserError, match="sparsity must be in"):
        sweep("no-such-model", [1.5], ["fast"], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = sparsellm(
        *("sweep", model_dir, "--variants", "[wanda]", "--out", "~/out"),
        *("--data.sequence_length", 64, "--data.max_eval_windows", 4, "--settings", "{num_calibration_samples: 4}"),
        *("--pattern", "2:4"),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "wanda    50 %" in run.stdout
    assert f"written to {tmp_path / 'out'}" in run.stdout


def test_another_text_needs_another_folder(tmp_path: Path, model_dir: Path) -> None:
    """Also if its files have the same names, or only another field of the table is read."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"{name} " * 2000)

    def of(folder: str, **more: Any) -> TextDataModule:
        files = [str(tmp_path / folder / "text.txt")]
        options: dict[str, Any] = {"tokenizer": str(model_dir), "train_files": files, "test_files": files}
        return TextDataModule("files", sequence_length=64, **{**options, **more})

    out = str(tmp_path / "sweep")
    for data in [of("a", tokenizer=None)] * 2:  # the second time it has loaded a tokenizer
        sweep(str(model_dir), [0.5], ["magnitude"], out, data, SETTINGS)
    sweep(str(model_dir), [0.5], ["magnitude"], out, of("a", batch_size=2), SETTINGS)
    for data in (of("b"), of("a", text_field="other"), of("a", seed=1)):
        with pytest.raises(UserError, match="another model, text, settings"):
            sweep(str(model_dir), [0.5], ["magnitude"], out, data, SETTINGS)
    (tmp_path / "a" / "text.txt").write_text("c " * 3000)
    with pytest.raises(UserError, match="another model, text, settings"):
        sweep(str(model_dir), [0.5], ["magnitude"], out, of("a"), SETTINGS)


def test_refused_before_the_dense_model_is_measured(tmp_path: Path, model_dir: Path) -> None:
    settings = {**SETTINGS, "ignore": ["no-such-layer"]}
    with mock.patch.object(module, "perplexity", side_effect=AssertionError("measured")), pytest.raises(UserError):
        sweep(str(model_dir), [0.5], ["magnitude"], str(tmp_path / "out"), text(model_dir), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "best"}, "settings must leave preset"),
        ({"sparsity": 0.7}, "settings must leave sparsity"),
        ({"method": "wanda"}, "settings must leave method"),
        ({"damping": "10%"}, "settings must have the types"),
        ({"allocation_spread": None}, "settings must have the types"),
        ({"ignore": None}, "settings must have the types"),
        ({"penalties": {"betta": 2}}, "penalties' names must be one of alpha"),
        ({"penalties": 3}, "settings must have the types"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep("no-such-model", [0.5], ["sparsegpt"], str(tmp_path / "out"), settings=settings)


def test_a_corrected_command_after_a_refusal(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "text.txt").write_text("a b c " * 3000)
    files: dict[str, Any] = {
        "sequence_length": 64,
        "tokenizer": str(model_dir),
        "train_files": [str(tmp_path / "text.txt")],
    }
    out = str(tmp_path / "sweep")
    with pytest.raises(UserError, match=r"Set data\.test_files"):
        sweep(str(model_dir), [0.5], ["magnitude"], out, TextDataModule("files", **files), SETTINGS)
    corrected = TextDataModule("files", **files, test_files=files["train_files"])
    sweep(str(model_dir), [0.5], ["magnitude"], out, corrected, SETTINGS)


def test_out_is_the_working_folder_or_a_file(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(str(model_dir), [0.5], ["magnitude"], ".", text(model_dir), SETTINGS)
    assert (tmp_path / "sweep.csv").is_file()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="out must be a folder, but file is a file"):
        sweep(str(model_dir), [0.5], ["magnitude"], "file", text(model_dir), SETTINGS)


def test_a_table_inside_the_folder_of_the_model(tmp_path: Path, model_dir: Path) -> None:
    """What a sweep or an evaluation writes there does not count as another model. Other weights do."""
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    for _ in range(2):
        sweep(str(model), [0.5], ["magnitude"], str(model / "sweep"), text(model_dir), SETTINGS)
        (model / "tasks.json").write_text("{}")
    os.utime(model / "model.safetensors")
    with pytest.raises(UserError, match="another model"):
        sweep(str(model), [0.5], ["magnitude"], str(model / "sweep"), text(model_dir), SETTINGS)
