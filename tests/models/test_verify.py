"""``verify`` finds every way in which an export's files differ from its report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.batches import random_batches
from support.cli import sparsellm
from support.models import build_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsellm_lightning import (
    PruningConfig,
    TextDataModule,
    UserError,
    export_model,
    perplexity,
    prune_model,
    verify_export,
)
from sparsellm_lightning.models import REPORT_NAME, add_to_report

CONFIG = PruningConfig(preset="paper", method="wanda", sparsity=0.5, num_calibration_samples=8)
LAYER = "model.layers.1.mlp.up_proj"


def exported(name: str, folder: Path, config: PruningConfig = CONFIG) -> Path:
    model = build_model(name)
    report = prune_model(model, random_batches(), config)
    report.perplexity["pruned"] = perplexity(model, random_batches())
    return export_model(model, folder, report=report.to_dict)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("llama", tmp_path_factory.mktemp("export") / "out", replace(CONFIG, pattern="2:4", sparsity=None))


@pytest.fixture
def folder(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "out"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "opt-350m", "gemma3", "gpt_neox"])
def test_a_true_report(name: str, tmp_path: Path) -> None:
    folder = exported(name, tmp_path / "out", replace(CONFIG, pattern="2:4", sparsity=None))
    assert verify_export(folder, random_batches()) == []


def test_a_sharded_export(tmp_path: Path) -> None:
    model = build_model("llama")
    report = prune_model(model, random_batches(), CONFIG)
    folder = export_model(model, tmp_path / "out", report=report.to_dict)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    listed = json.loads((folder / REPORT_NAME).read_text())
    listed["files"].remove("model.safetensors")
    (folder / REPORT_NAME).write_text(json.dumps(listed))
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert verify_export(folder) == []
    damaged = sorted(folder.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert any(f"{damaged.name}: cannot be read" in line for line in verify_export(folder))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def swap_pair(tensors: dict[str, torch.Tensor]) -> None:
    """Three kept weights in one group and one in the next: as many zeros as before."""
    row = tensors[f"{LAYER}.weight"][0]
    kept, zero = int(row[4:8].nonzero()[0]) + 4, int((row[:4] == 0).nonzero()[0])
    row[zero], row[kept] = row[kept].item(), 0.0


def test_what_differs_is_named(folder: Path) -> None:
    change(folder, lambda t: t[f"{LAYER}.weight"][0].fill_(1.0))
    found = verify_export(folder)
    assert [line.split(":")[0] for line in found] == [LAYER, LAYER, "sparsity"]
    assert "files hold 0.49" in found[0]
    assert "pattern 2:4, the files break it" in found[1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap_pair, f"{LAYER}: the report says pattern 2:4, the files break it"),
        (lambda t: t["model.norm.weight"][3].fill_(float("nan")), "model.norm.weight: holds NaN or infinity"),
        (lambda t: t.pop("model.norm.weight"), "lacks 1, such as model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "transformers must be able to load"),
    ],
)
def test_changed_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    change(folder, edit)
    assert any(message in line for line in verify_export(folder))


def test_a_head_that_should_be_tied(tmp_path: Path) -> None:
    folder = exported("gpt2", tmp_path / "out")
    change(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    (line,) = verify_export(folder)
    assert "the files hold two different tensors" in line
    change(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"]}))
    assert verify_export(folder) == []


def test_changed_reports(folder: Path) -> None:
    whole = json.loads((folder / REPORT_NAME).read_text())

    def write(**changed: Any) -> None:
        (folder / REPORT_NAME).write_text(json.dumps(whole | changed))

    write(sparsity={"achieved": 0.6})
    assert verify_export(folder) == ["sparsity: the report says 0.600000 over all projections, the files hold 0.500000"]
    write(layers=whole["layers"][1:])
    assert verify_export(folder) == [
        f"{whole['layers'][0]['name']}: this projection is in the model, not in the report"
    ]
    write(files=[*whole["files"], "missing.png"])
    assert verify_export(folder) == ["missing.png: the report names this file, but it is missing"]
    write(perplexity={"pruned": whole["perplexity"]["pruned"] * 1.02})
    (line,) = verify_export(folder, random_batches())
    assert line.startswith("perplexity: the report says")
    assert verify_export(folder, random_batches(), tolerance=0.03) == []
    measured = {"windows": 24, "length": 512, "source": "a.txt"}
    write(perplexity={"pruned": 1.5}, evaluation=measured)
    (line,) = verify_export(folder, random_batches())
    assert line.startswith("perplexity: the report says 1.5000 on 24 windows of 512 tokens of a.txt, the files give")
    write(perplexity={"pruned": 1.0, "finetuned": whole["perplexity"]["pruned"]})
    assert verify_export(folder, random_batches()) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": NaN}', None])
def test_reports_that_are_none(folder: Path, content: str | None) -> None:
    (folder / REPORT_NAME).unlink() if content is None else (folder / REPORT_NAME).write_text(content)
    with pytest.raises(UserError, match="verify needs an export with a whole"):
        verify_export(folder)


def test_a_configuration_that_is_none(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert any("transformers must be able to load" in line for line in verify_export(folder))


def test_the_command(
    trained: Callable[[str], PreTrainedModel],
    text: TextDataModule,
    tokenizer: PreTrainedTokenizerFast,
    calibration: Any,
    tmp_path: Path,
) -> None:
    model = trained("llama")
    report = prune_model(model, calibration, CONFIG)
    report.perplexity["pruned"] = perplexity(model, text.val_dataloader())
    export_model(model, tmp_path / "out", tokenizer, report=report.to_dict)
    data = ["--data.source", "python-docs", "--data.sequence_length", "64", "--data.max_eval_windows", "64"]
    run = sparsellm("verify", "out", *data, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "out is what its report says.\n")
    assert sparsellm("verify", "out", cwd=tmp_path).stdout == "out is what its report says.\n"
    add_to_report(str(tmp_path / "out"), perplexity={"pruned": 1.02 * report.perplexity["pruned"]})
    assert sparsellm("verify", "out", *data, cwd=tmp_path).returncode == 1
    assert sparsellm("verify", "out", *data, "--tolerance", 0.03, cwd=tmp_path).returncode == 0
    (tmp_path / "train.txt").write_text("text")
    run = sparsellm("verify", "out", "--data.source", "files", "--data.train_files", "train.txt", cwd=tmp_path)
    assert "Set data.test_files." in run.stderr
    change(tmp_path / "out", lambda t: t[f"{LAYER}.weight"].fill_(1.0))
    run = sparsellm("verify", "typo", *data, cwd=tmp_path)
    assert run.returncode == 1
    assert "verify needs an export with a whole pruning_report.json, but that of typo" in run.stderr
    run = sparsellm("verify", "out", *data, cwd=tmp_path)
    assert run.returncode == 1
    assert "sparsellm: error: out is not what its report says:\nmodel.layers.1.mlp.up_proj: the report" in run.stderr


def test_an_ignored_projection_may_hold_a_zero(tmp_path: Path) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 0
    config = replace(CONFIG, pattern="2:4", sparsity=None, ignore=["*.down_proj"])
    report = prune_model(model, random_batches(), config)
    assert verify_export(export_model(model, tmp_path / "out", report=report.to_dict)) == []
