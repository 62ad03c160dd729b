"""The pruning callback inside a Trainer, with ``CausalLM`` and with a user's own module."""

from __future__ import annotations

import copy
import csv
import json
import math
import pickle
import shutil
import signal
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from support.models import VOCABULARY, build_model
from support.runs import assert_same_weights, zero_smaller_half
from support.training import OwnModule, trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    PruningConfig,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    perplexity,
    prune_model,
)
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.callbacks import exporting
from sparsellm_lightning.callbacks.checks import check_launcher, check_trainer
from sparsellm_lightning.data.loaders import calibration_batches, validation_batches
from sparsellm_lightning.distributed import adapter_for
from sparsellm_lightning.models import load_model
from sparsellm_lightning.pipeline.resume import Journal
from sparsellm_lightning.reporting.card import model_card

PRUNE_MODEL = "sparsellm_lightning.callbacks.reports.prune_model"


def zeros(model: PreTrainedModel) -> float:
    weights = [p.parameter for p in describe(model).projections()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_prune_only_in_own_module(trained, ids: torch.Tensor) -> None:
    module = OwnModule(trained("opt"))
    dense_head = module.backbone.lm_head.weight.clone()
    pruner = SparseLLMCallback(preset="paper", method="sparsegpt", sparsity=0.6, num_calibration_samples=32)
    trainer(pruner).fit(module, DataLoader(ids, batch_size=8))
    assert module.batches_seen == 0, "no batch is trained"
    assert zeros(module.backbone) == pytest.approx(0.6, abs=0.002)
    assert torch.equal(module.backbone.lm_head.weight, dense_head)
    assert pruner.report is not None
    assert pruner.report.perplexity == {"dense": None, "pruned": None}


def test_finetune_trains_on_and_keeps_the_zeros(trained, text, ids: torch.Tensor) -> None:
    module = OwnModule(trained("llama"))
    pruner = SparseLLMCallback(
        preset="paper", method="sparsegpt", sparsity=0.7, finetune=True, num_calibration_samples=32
    )
    fit = trainer(pruner, max_steps=30)
    fit.fit(module, DataLoader(ids, batch_size=8), text.test_dataloader())
    assert module.batches_seen == 30
    assert pruner.report is not None
    assert zeros(module.backbone) == pytest.approx(pruner.report.sparsity["achieved"])
    measured = pruner.report.perplexity
    assert measured["dense"] < measured["finetuned"] < measured["pruned"]
    assert measured["finetuned"] == pytest.approx(perplexity(module.backbone, text.test_dataloader()), rel=1e-5)


def test_the_loss_beside_that_of_sparsegpt(tmp_path: Path, trained, text, ids: torch.Tensor) -> None:
    settings: dict[str, Any] = {"sparsity": 0.7, "num_calibration_samples": 32}

    def pruned(**more: Any) -> tuple[OwnModule, Any]:
        module, pruner = OwnModule(trained("llama")), SparseLLMCallback(**settings, **more)
        trainer(pruner).fit(module, DataLoader(ids, batch_size=8), text.test_dataloader())
        assert pruner.report is not None
        return module, pruner.report

    module, report = pruned(preset="fast", baseline=True, export_dir=str(tmp_path / "out"))
    alone, _ = pruned(preset="fast")
    _, sparsegpt = pruned(preset="paper", method="sparsegpt")
    for one, other in zip(module.backbone.parameters(), alone.backbone.parameters(), strict=True):
        assert torch.equal(one, other), "the run started from the dense weights"
    assert report.perplexity["sparsegpt"] == pytest.approx(sparsegpt.perplexity["pruned"], rel=1e-6)
    gaps = [math.log(report.perplexity[name] / report.perplexity["dense"]) for name in ("pruned", "sparsegpt")]
    assert f"| {gaps[0]:.3f} | {gaps[0] / gaps[1]:.2f} |" in (tmp_path / "out" / "README.md").read_text()
    assert report.phases["baseline"] > 0


def test_the_baseline_is_resumed(tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped while it prunes solves no block of the baseline again."""
    write, written = Journal.write, []

    def stop(*args: Any) -> None:
        written.append(args)
        if len(written) == 5:  # the second block of the run itself
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(Journal, "write", stop)
    settings: dict[str, Any] = {**MAGNITUDE, "baseline": True, "resume_dir": str(tmp_path / "journal")}

    def run() -> SparseLLMCallback:
        held = SparseLLMCallback(**settings)
        trainer(held).fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8), DataLoader(ids[:4]))
        return held

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run()
    assert run().report is not None
    assert len(written) == 7, "three of the baseline, one, the one that stopped, and the last two"


def test_missing_calibration_text_is_named_before_the_dense_model_is_measured(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test.txt").write_text("A text of some words. " * 200)
    monkeypatch.setattr("sparsellm_lightning.callbacks.measuring.perplexity", lambda *args, **kwargs: 1 / 0)
    data = TextDataModule("files", test_files=[str(tmp_path / "test.txt")], sequence_length=16)
    with pytest.raises(UserError, match="train_files"):
        trainer(SparseLLMCallback(**MAGNITUDE)).fit(CausalLM(str(model_dir)), data)


def test_the_baseline_needs_zeros() -> None:
    with pytest.raises(UserError, match="pattern neurons"):
        SparseLLMCallback(pattern="neurons", baseline=True)
    with pytest.raises(UserError, match="got measure False"):
        SparseLLMCallback(measure=False, baseline=True)


def test_the_baseline_needs_a_perplexity(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsellm_lightning.callbacks.measuring.prune_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UserError, match=r"baseline compares perplexities.*no validation windows"):
        trainer(SparseLLMCallback(**MAGNITUDE, baseline=True)).fit(
            OwnModule(build_model("llama")), DataLoader(ids, batch_size=8)
        )


def test_models_are_found_by_type(trained, ids: torch.Tensor) -> None:
    module = OwnModule(trained("llama"), teacher=trained("llama"))
    with pytest.raises(UserError, match=r"found backbone, teacher.*model_attribute"):
        trainer(SparseLLMCallback(preset="paper")).fit(module, DataLoader(ids))
    with pytest.raises(UserError, match="student is missing"):
        trainer(SparseLLMCallback(preset="paper", model_attribute="student")).fit(module, DataLoader(ids))
    trainer(
        SparseLLMCallback(preset="paper", method="sparsegpt", model_attribute="teacher", num_calibration_samples=8)
    ).fit(module, DataLoader(ids))
    assert zeros(module.teacher) > 0.45 > 0.01 > zeros(module.backbone)

    class Empty(OwnModule):
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

    with pytest.raises(UserError, match="found none"):
        trainer(SparseLLMCallback(preset="paper")).fit(Empty(), DataLoader(ids))


def test_a_resumed_run_does_not_prune_again(tmp_path: Path, trained, ids: torch.Tensor, monkeypatch) -> None:
    first = OwnModule(trained("llama"))
    loader = DataLoader(ids, batch_size=8)
    run = trainer(
        SparseLLMCallback(preset="paper", method="magnitude", sparsity=0.6, finetune=True, num_calibration_samples=16),
        max_steps=3,
    )
    run.fit(first, loader)
    run.save_checkpoint(tmp_path / "stopped.ckpt")

    monkeypatch.setattr(PRUNE_MODEL, lambda *a, **k: pytest.fail("pruned again"))
    second = OwnModule(trained("llama"))
    pruner = SparseLLMCallback(
        preset="paper", method="magnitude", sparsity=0.6, finetune=True, num_calibration_samples=16
    )
    trainer(pruner, max_steps=6).fit(second, loader, ckpt_path=tmp_path / "stopped.ckpt")
    assert second.batches_seen == 3
    assert zeros(second.backbone) == pytest.approx(0.6, abs=0.002)
    assert pruner.report is not None, "the report came with the checkpoint"


def test_a_second_fit_prunes_another_model(tmp_path: Path, trained, ids: torch.Tensor, monkeypatch) -> None:
    """A second model is pruned, exported and reported as its own. The same model is not pruned again."""
    loader, out = DataLoader(ids, batch_size=8), tmp_path / "out"
    pruner = SparseLLMCallback(
        preset="paper", method="wanda", sparsity=0.6, num_calibration_samples=8, export_dir=str(out), overwrite=True
    )
    first, second = OwnModule(trained("llama")), OwnModule(trained("opt"))
    trainer(pruner).fit(first, loader)
    trainer(pruner).fit(second, loader)
    assert zeros(second.backbone) == pytest.approx(0.6, abs=0.01)  # wanda rounds in every row
    report = json.loads((out / "pruning_report.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == [p.name for p in describe(second.backbone).projections()]
    exported = AutoModelForCausalLM.from_pretrained(out)
    for name, weight in second.backbone.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight), name

    before = copy.deepcopy(second.backbone.state_dict())
    monkeypatch.setattr(PRUNE_MODEL, lambda *a, **k: pytest.fail("pruned again"))
    trainer(pruner).fit(OwnModule(second.backbone), loader)
    assert all(torch.equal(weight, before[name]) for name, weight in second.backbone.state_dict().items())
    assert json.loads((out / "pruning_report.json").read_text())["layers"] == report["layers"]


class Batches(pl.Callback):
    """The batches that are trained."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.seen.append(batch.clone())


@pytest.mark.parametrize("stages", [{"sparsity": 0.6}, {"schedule": {0: 0.5, 2: 0.6, 5: 0.7}}], ids=["once", "gradual"])
def test_calibration_takes_no_training_batches(trained, ids: torch.Tensor, stages: dict[str, Any]) -> None:
    """Without a datamodule, training gets the batches of a run that does not calibrate, also from persistent workers."""

    def trained_on(*callbacks: pl.Callback) -> torch.Tensor:
        pl.seed_everything(0, verbose=False)
        loader = DataLoader(ids[:24], batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
        batches = Batches()
        trainer(*callbacks, batches, max_steps=8).fit(OwnModule(trained("llama")), loader)  # an epoch has six batches
        return torch.cat(batches.seen)

    pruner = SparseLLMCallback(preset="paper", method="magnitude", finetune=True, num_calibration_samples=8, **stages)
    expected = trained_on()
    assert len(expected) == 32
    assert torch.equal(trained_on(pruner), expected)
    assert pruner.report is not None
    assert pruner.report.calibration["source"] == "training dataloader"


def test_evaluation_is_a_phase_without_an_export(model_dir: Path) -> None:
    data = TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=8)
    pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=4)
    trainer(pruner).fit(CausalLM(str(model_dir)), data)
    assert pruner.report is not None
    assert pruner.report.phases["evaluation"] > 0
    assert "export" not in pruner.report.phases


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="'sparsty'"):
        SparseLLMCallback(sparsty=0.7)


def test_calibration_comes_from_the_datamodule(model_dir: Path, monkeypatch) -> None:
    data = TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=8)
    asked = []
    original = data.calibration_dataloader
    monkeypatch.setattr(
        data,
        "calibration_dataloader",
        lambda num_samples, seed: asked.append((num_samples, seed)) or original(num_samples, seed),
    )
    trainer(SparseLLMCallback(preset="paper", method="wanda", num_calibration_samples=8, seed=5)).fit(
        CausalLM(str(model_dir)), data
    )
    assert asked == [(8, 5)]


def test_seed_chooses_other_windows(model_dir: Path) -> None:
    def pruned_with(seed: int) -> torch.Tensor:
        module = CausalLM(str(model_dir))
        data = TextDataModule(sequence_length=32, batch_size=4)
        pruner = SparseLLMCallback(preset="paper", method="wanda", num_calibration_samples=8, seed=seed, measure=False)
        trainer(pruner).fit(module, data)
        return module.model.model.layers[0].mlp.up_proj.weight

    assert torch.equal(pruned_with(1), pruned_with(1))
    assert not torch.equal(pruned_with(1), pruned_with(2))


def test_seed_orders_a_shuffled_train_loader(trained, ids: torch.Tensor) -> None:
    def pruned_with(seed: int) -> torch.Tensor:
        module = OwnModule(trained("llama"))
        pruner = SparseLLMCallback(preset="paper", method="wanda", num_calibration_samples=8, seed=seed)
        trainer(pruner).fit(module, DataLoader(ids, batch_size=4, shuffle=True))
        return module.backbone.model.layers[0].mlp.up_proj.weight

    assert torch.equal(pruned_with(1), pruned_with(1))
    assert not torch.equal(pruned_with(1), pruned_with(2))


@pytest.mark.draws
def test_export_and_report_are_true(tmp_path: Path, model_dir: Path) -> None:
    """Plain transformers reads the exported model, which has the sparsities and the perplexity of the report."""
    target = tmp_path / "out"
    data = TextDataModule(sequence_length=64, batch_size=8, max_eval_windows=16)
    pruner = SparseLLMCallback(preset="paper", sparsity=0.7, num_calibration_samples=16, export_dir=str(target))
    trainer(pruner).fit(CausalLM(str(model_dir)), data)

    model = AutoModelForCausalLM.from_pretrained(target)
    report = json.loads((target / "pruning_report.json").read_text())
    assert set(report) >= {
        *("model", "method", "pattern", "sparsity", "perplexity", "layers", "blocks"),
        *("wall_seconds", "peak_memory_bytes", "added_memory_bytes", "versions", "config"),
    }
    for layer in report["layers"]:
        weight = model.get_submodule(layer["name"]).weight
        assert list(weight.shape) == layer["shape"]
        assert float((weight == 0).double().mean()) == pytest.approx(layer["sparsity"], abs=1e-12)
    assert report["sparsity"]["requested"] == 0.7
    assert report["sparsity"]["achieved"] == pytest.approx(zeros(model))
    assert [len(block["errors"]) for block in report["blocks"]] == [4, 4, 4]

    # Perplexity by hand: plain transformers and plain cross-entropy over the same windows.
    losses = []
    for batch in data.test_dataloader():
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[:, :-1].double()
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
            )
        )
    assert report["perplexity"]["pruned"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert report["perplexity"]["dense"] < report["perplexity"]["pruned"]
    assert AutoTokenizer.from_pretrained(target)("for x in y")["input_ids"]
    for name in ("stages.png", "layers.png"):
        assert (target / name).stat().st_size > 5000


EXPORTING = {"preset": "paper", "method": "magnitude", "num_calibration_samples": 4, "measure": False}


def fit_to(model_dir: Path, *callbacks: pl.Callback, **options: Any) -> None:
    data = TextDataModule(sequence_length=32, batch_size=8, max_eval_windows=2)
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    fit = trainer(SparseLLMCallback(**EXPORTING, **options), *callbacks, enable_checkpointing=checkpointing)
    fit.fit(CausalLM(str(model_dir)), data)


def test_export_directory_in_use(tmp_path: Path, model_dir: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    with pytest.raises(UserError, match=r"must be empty.*overwrite"):
        fit_to(model_dir, export_dir=str(out))
    with pytest.raises(UserError, match=r"no export wrote, such as precious\.txt"):
        fit_to(model_dir, export_dir=str(out), overwrite=True)
    (out / "precious.txt").unlink()
    fit_to(model_dir, export_dir=str(out))
    fit_to(model_dir, export_dir=str(out), overwrite=True)
    assert (out / "config.json").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}, "no lock and no partial folder is left"


def test_a_journal_or_checkpoints_inside_the_export_are_refused(tmp_path: Path, model_dir: Path) -> None:
    inside = str(tmp_path / "out" / "more")
    with pytest.raises(UserError, match="resume_dir must not lie inside export_dir"):
        fit_to(model_dir, export_dir=str(tmp_path / "out"), resume_dir=inside)
    checkpoints = ModelCheckpoint(inside)
    with pytest.raises(UserError, match=r"ModelCheckpoint\.dirpath must not lie inside export_dir"):
        fit_to(model_dir, checkpoints, export_dir=str(tmp_path / "out"))


def test_two_runs_with_one_export_dir(tmp_path: Path, model_dir: Path) -> None:
    """The second is refused before it prunes, and the first is not disturbed."""

    class Second(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with pytest.raises(UserError, match="is being written by another run"):
                fit_to(model_dir, export_dir=str(tmp_path / "out"))

    fit_to(model_dir, Second(), export_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_export_that_fails_at_the_end_is_rescued(tmp_path: Path, model_dir: Path) -> None:
    """Somebody puts a file where the folder should go, after the check at the start."""

    class Intruder(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            (tmp_path / "out").write_text("x")

    with pytest.raises(UserError, match=r"could not be written.*The model is in") as caught:
        fit_to(model_dir, Intruder(), export_dir=str(tmp_path / "out"))
    rescued = Path(str(caught.value).rsplit("The model is in ", 1)[1].rstrip("."))
    assert rescued.parent == tmp_path
    assert AutoModelForCausalLM.from_pretrained(rescued) is not None
    assert (rescued / "pruning_report.json").exists()


def test_the_tokenizer_of_the_text(tmp_path: Path, model_dir: Path, ids: torch.Tensor) -> None:
    """Takes the place of one that the model lacks. Without either, text ends the run before pruning; tokens need none."""
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    for file in model.glob("tokenizer*"):
        file.unlink()
    pruner = SparseLLMCallback(**EXPORTING, export_dir=str(tmp_path / "out"))
    options: dict[str, Any] = {"sequence_length": 32, "batch_size": 8, "max_eval_windows": 2}
    with pytest.raises(
        UserError, match=r"transformers must be able to load.* If .* no tokenizer, set data\.tokenizer to"
    ):
        trainer(pruner).fit(CausalLM(str(model)), TextDataModule(**options))
    assert pruner.report is None
    trainer(pruner).fit(CausalLM(str(model)), TextDataModule(**options, tokenizer=str(model_dir)))
    wanted = AutoTokenizer.from_pretrained(model_dir)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == wanted.get_vocab()
    pruner = SparseLLMCallback(**EXPORTING, export_dir=str(tmp_path / "plain"))
    with pytest.warns(UserWarning, match="The model goes without a tokenizer"):
        trainer(pruner).fit(CausalLM(str(model)), DataLoader(ids, batch_size=8))
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    pruner = SparseLLMCallback(**EXPORTING, export_dir=str(tmp_path / "written"))
    with pytest.warns(UserWarning, match="The model goes without a tokenizer"):
        trainer(pruner).fit(CausalLM(str(model)), TextDataModule("self", **options))
    assert (tmp_path / "written" / "model.safetensors").is_file()


def test_the_tokenizer_of_the_model_is_exported(tmp_path: Path, model_dir: Path) -> None:
    """Not that of the text, which may lack its chat template."""
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    chatting = AutoTokenizer.from_pretrained(model_dir)
    chatting.chat_template = "{{ messages }}"
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    chatting.save_pretrained(model)
    data = TextDataModule(sequence_length=32, batch_size=8, max_eval_windows=2, tokenizer=str(other))
    trainer(SparseLLMCallback(**EXPORTING, export_dir=str(tmp_path / "out"))).fit(CausalLM(str(model)), data)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


def test_a_resumed_run_refuses_another_sparsity(tmp_path: Path, model_dir: Path) -> None:
    def run(sparsity: float, **options: Any) -> pl.Trainer:
        pruner = SparseLLMCallback(**EXPORTING, sparsity=sparsity, finetune=True)
        fit = trainer(pruner, max_steps=options.pop("max_steps"))
        data = TextDataModule(sequence_length=32, batch_size=8, max_eval_windows=2)
        fit.fit(CausalLM(str(model_dir)), data, **options)
        return fit

    run(0.5, max_steps=1).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"has pruned to 0\.5 .* the settings ask for 0\.9"):
        run(0.9, max_steps=2, ckpt_path=tmp_path / "last.ckpt")
    run(0.5, max_steps=2, ckpt_path=tmp_path / "last.ckpt")


def test_figures_reach_loggers(tmp_path: Path, trained, ids: torch.Tensor) -> None:
    """A row for each block, one for the run, the settings as hyperparameters, and the run's figures for sweeps."""
    logger = CSVLogger(tmp_path, name="", version="run")
    pruner = SparseLLMCallback(preset="paper", sparsity=0.6, num_calibration_samples=32)
    batches = DataLoader(ids, batch_size=8)
    run = trainer(pruner, logger=logger, log_every_n_steps=1)
    run.fit(OwnModule(trained("llama")), batches, batches)
    logger.save()
    report = pruner.report
    assert report is not None
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_block = {int(row["step"]): row for row in rows if row["prune/layer_error"]}
    assert [float(by_block[block["index"]]["prune/feed_forward_error"]) for block in report.blocks] == pytest.approx(
        [min(block["held_out_errors"]) for block in report.blocks]
    )
    names = set(rows[0])
    assert not [name for name in names for other in names if name.startswith(f"{other}/")], "MLflow makes files of them"
    (last,) = (row for row in rows if row["prune/perplexity/pruned"])
    assert float(last["prune/perplexity/pruned"]) == pytest.approx(report.perplexity["pruned"])
    assert float(last["prune/seconds_of_phase/alternation"]) == pytest.approx(report.phases["alternation"])
    assert float(run.callback_metrics["prune/perplexity/pruned"]) == pytest.approx(report.perplexity["pruned"])
    assert float(run.callback_metrics["prune/sparsity"]) == pytest.approx(0.6, abs=1e-3)
    assert yaml.safe_load((tmp_path / "run" / "hparams.yaml").read_text())["pruner"]["sparsity"] == 0.6


def test_no_examples_where_the_context_is_too_short(tmp_path: Path, tokenizer: Any) -> None:
    """Positions are learned: token 33 has none."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pruner = SparseLLMCallback(
        preset="paper", method="magnitude", num_calibration_samples=4, export_dir=str(tmp_path / "out")
    )
    data = TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4)
    trainer(pruner).fit(CausalLM(str(tmp_path / "model")), data)
    assert pruner.report.examples == []
    assert pruner.report.perplexity["pruned"] > 0


def test_report_names_texts_and_shows_examples(tmp_path: Path, model_dir: Path, text: TextDataModule) -> None:
    pruner = SparseLLMCallback(
        preset="paper", sparsity=0.6, num_calibration_samples=8, finetune=True, export_dir=str(tmp_path / "out")
    )
    trainer(pruner, max_steps=1).fit(CausalLM(str(model_dir)), text)
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    windows = [batch["input_ids"] for batch in text.val_dataloader()]
    assert report["evaluation"] == {
        "source": "python-docs, test split",
        "windows": sum(map(len, windows)),
        "length": windows[0].shape[1],
    }
    assert report["calibration"]["source"] == "python-docs, train split"
    assert report["dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert [example["prompt"] for example in report["examples"]] == tokenizer.batch_decode(windows[0][:3, :16])
    for state, folder in (("dense", model_dir), ("finetuned", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generation_config.eos_token_id = None
        expected = model.generate(windows[0][:3, :16], max_new_tokens=24, do_sample=False)[:, 16:]
        assert [example[state] for example in report["examples"]] == tokenizer.batch_decode(expected)
    assert all(example.keys() == {"prompt", "dense", "pruned", "finetuned"} for example in report["examples"])


@pytest.mark.parametrize("setting", [{"max_steps": 0}, {"max_epochs": 0}, {"limit_train_batches": 0}])
def test_nothing_would_run(trained, ids: torch.Tensor, setting: dict[str, int]) -> None:
    with pytest.raises(UserError, match="nothing would run"):
        trainer(SparseLLMCallback(preset="paper"), **setting).fit(OwnModule(trained("llama")), DataLoader(ids))


def test_min_steps_contradicts_prune_only(trained, ids: torch.Tensor) -> None:
    with pytest.raises(UserError, match="finetune"):
        trainer(SparseLLMCallback(preset="paper"), min_steps=5).fit(OwnModule(trained("llama")), DataLoader(ids))


def test_validation_of_causal_lm_agrees_with_perplexity(model_dir: Path) -> None:
    module = CausalLM(str(model_dir))
    data = TextDataModule(sequence_length=64, batch_size=8, max_eval_windows=20)
    (measured,) = trainer().validate(module, data, verbose=False)
    assert measured["val_perplexity"] == pytest.approx(perplexity(module.model, data.val_dataloader()), rel=1e-5)


def test_padding_and_labels_in_perplexity(trained, ids: torch.Tensor) -> None:
    model = trained("llama")
    plain = perplexity(model, [{"input_ids": ids[:8]}])
    padded = torch.nn.functional.pad(ids[:8], (0, 9))
    mask = torch.nn.functional.pad(torch.ones_like(ids[:8]), (0, 9))
    assert perplexity(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(plain, rel=1e-5)
    labels = ids[:8].clone()
    labels[:, :32] = -100
    expected = []
    with torch.no_grad():
        logits = model(ids[:8]).logits.double()
    for row in range(8):
        for position in range(32, ids.shape[1]):
            expected.append(-torch.log_softmax(logits[row, position - 1], 0)[ids[row, position]])
    measured = perplexity(model, [{"input_ids": ids[:8], "labels": labels}])
    assert measured == pytest.approx(float(torch.stack(expected).mean().exp()), rel=1e-4)


def test_attributes_of_the_users_own(tmp_path: Path, text: TextDataModule, ids: torch.Tensor) -> None:
    """Class weights, a tokenizer of another library and a flag do not mean what they mean in ``CausalLM``."""
    module = OwnModule(build_model("llama"))
    module.weights, module.pretrained = torch.tensor([1.0, 3.0]), True  # type: ignore[assignment]
    module.tokenizer = object()  # type: ignore[assignment]
    pruner = SparseLLMCallback(
        preset="paper", method="magnitude", sparsity=0.6, num_calibration_samples=8, export_dir=str(tmp_path / "out")
    )
    text.calibration_dataloader(1)  # it has tokenised something
    trainer(pruner, max_steps=1).fit(module, datamodule=text)
    assert zeros(module.backbone) == pytest.approx(0.6, abs=0.002)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == text.tokenizer.vocab_size  # type: ignore[union-attr]
    assert pruner.report is not None
    assert isinstance(pruner.report.model, str)


@pytest.mark.parametrize("by", ["exception", "slurm"])
def test_no_checkpoint_is_saved_of_a_half_pruned_model(
    by: str, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would go on from it unasked. The same command goes on from the blocks in ``resume_dir``."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "preset": "paper",
        "method": "magnitude",
        "num_calibration_samples": 8,
        "finetune": True,
    }
    loader = DataLoader(ids, batch_size=8)

    def run(**more: Any) -> tuple[OwnModule, pl.Trainer]:
        module = OwnModule(build_model("llama"))
        saving = OnExceptionCheckpoint("exceptions")
        fit = trainer(SparseLLMCallback(**settings, **more), saving, max_steps=2, enable_checkpointing=True)
        fit.fit(module, loader)
        return module, fit

    def stop(running: pl.Trainer, *args: Any) -> None:
        if by == "slurm":  # requeues, and then ends the job
            running._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type]
        raise RuntimeError("the power went out")

    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: 0)
    with monkeypatch.context() as patch:
        patch.setattr("sparsellm_lightning.callbacks.reports.log_block", stop)
        with pytest.raises(RuntimeError, match="power"):
            run(resume_dir="resume")
    assert not list(tmp_path.rglob("*.ckpt"))
    again, fit = run(resume_dir="resume")
    assert_same_weights(again, run()[0])
    fit.save_checkpoint("after.ckpt")
    assert Path("after.ckpt").is_file()


def test_parts_that_were_pruned_before_are_named(ids: torch.Tensor) -> None:
    module = OwnModule(build_model("llama"))
    zero_smaller_half(describe(module.backbone).blocks[0].projections())
    pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=8)
    with pytest.warns(UserWarning, match=r"7 of 21 projections have many zeros already, such as model\.layers\.0"):
        trainer(pruner, max_steps=2).fit(module, DataLoader(ids, batch_size=8))


def test_a_model_sparser_than_asked(ids: torch.Tensor) -> None:
    """Its zeros beyond those asked for are filled, unless they are asked to stay."""
    config = PruningConfig(preset="paper", method="sparsegpt", sparsity=0.6, num_calibration_samples=8)
    model = build_model("llama")
    prune_model(model, [ids], config)
    fewer = replace(config, sparsity=0.5)
    with pytest.warns(UserWarning, match="The model has 60% zeros already, more than the 50% asked for"):
        prune_model(copy.deepcopy(model), [ids], fewer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prune_model(copy.deepcopy(model), [ids], fewer, keep_zeros=True)
        prune_model(model, [ids], config)


@pytest.mark.parametrize("pattern", ["heads", "neurons"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "admm", "magnitude"])
def test_zeros_behind_parts_that_left(ids: torch.Tensor, pattern: str, method: str) -> None:
    """These leave whole rows and columns of zeros. The matrices have the sparsity asked for all the same."""
    model = build_model("llama")
    prune_model(model, [ids], PruningConfig(preset="paper", pattern=pattern, sparsity=0.5))
    config = PruningConfig(preset="paper", method=method, sparsity=0.7)  # type: ignore[arg-type]
    report = prune_model(model, [ids], config, keep_zeros=True)
    assert [row["sparsity"] for row in report.layers] == pytest.approx([0.7] * len(report.layers), abs=0.002)


def test_several_training_loaders_calibrate_in_turn(ids: torch.Tensor) -> None:
    loaders = [DataLoader(ids[:12], batch_size=4), DataLoader(ids[12:16], batch_size=4)]
    wanted = [ids[:4], ids[12:16], ids[4:8], ids[8:12]]

    class Both(OwnModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(next(iter(batch.values() if isinstance(batch, dict) else batch)), batch_idx)

    class Noting(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            batches, sharded, _ = calibration_batches(trainer, 16, 0)
            assert not sharded
            assert all(torch.equal(found, expected) for found, expected in zip(batches, wanted, strict=True))

    for arranged in (loaders, dict(zip("ab", loaders, strict=True))):
        module = Both(build_model("llama"))
        pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=16)
        trainer(Noting(), pruner, max_steps=1).fit(module, arranged)
        assert zeros(module.backbone) > 0.45


def test_labels_of_windows_are_refused(ids: torch.Tensor) -> None:
    """A classifier on a language model with a head: perplexity would take one label a token."""
    batches = [{"input_ids": row, "labels": torch.tensor(1)} for row in ids]
    loader = DataLoader(batches, batch_size=4)  # type: ignore[arg-type, var-annotated]
    pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=8)
    with pytest.raises(UserError, match=r"labels of shape \(4,\) for tokens of shape \(4, 64\).*measure false"):
        trainer(pruner, num_sanity_val_steps=0).fit(OwnModule(build_model("llama")), loader, loader)


def test_validation_batches_in_any_arrangement(ids: torch.Tensor) -> None:
    """Loaders in a dict, in a list and combined give the perplexity of all of them together."""
    loaders = [DataLoader(ids[:8], batch_size=4), DataLoader(ids[8:20], batch_size=4)]
    found = []
    for arranged in (loaders, dict(zip("ab", loaders, strict=True)), CombinedLoader(loaders, "sequential")):
        module = OwnModule(build_model("llama"))
        pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=4)
        trainer(pruner, num_sanity_val_steps=0).fit(module, DataLoader(ids, batch_size=8), arranged)
        assert pruner.report is not None
        found.append(pruner.report.perplexity["dense"])

    class Combining(OwnModule):
        def val_dataloader(self) -> Any:
            return CombinedLoader(loaders, "sequential")

    pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=4)
    trainer(pruner, num_sanity_val_steps=0).fit(Combining(build_model("llama")), DataLoader(ids, batch_size=8))
    assert pruner.report is not None
    found.append(pruner.report.perplexity["dense"])
    assert found == [pytest.approx(perplexity(build_model("llama"), ids[:20].split(4)))] * 4


def test_a_shuffled_validation_loader_measures_the_same_windows(ids: torch.Tensor) -> None:
    """Its own generator goes on with every iteration, so that dense and pruned would be compared on other windows."""
    loader = DataLoader(ids, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    pruner = SparseLLMCallback(preset="paper", method="magnitude", sparsity=0.0, num_calibration_samples=4)
    run = trainer(pruner, num_sanity_val_steps=0, limit_val_batches=1)
    run.fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8), loader)
    assert pruner.report is not None
    assert pruner.report.perplexity["dense"] == pruner.report.perplexity["pruned"]


@pytest.mark.parametrize("unshaped", [True, False])
def test_validation_batches_of_another_form(ids: torch.Tensor, unshaped: bool) -> None:
    """Windows without a batch dimension are refused in words, and labels that are None are none."""
    batches = [{"input_ids": row} for row in ids] if unshaped else [{"input_ids": ids[:4].int(), "labels": None}]
    pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=4)
    run = trainer(pruner, num_sanity_val_steps=0)
    with pytest.raises(UserError, match="integers of shape") if unshaped else nullcontext():
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type, var-annotated]
        run.fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8), loader)
    if not unshaped:
        assert pruner.report is not None
        assert pruner.report.perplexity["dense"] == pytest.approx(perplexity(build_model("llama"), [ids[:4]]))


@pytest.mark.parametrize("sharded", [True, False])
def test_a_loader_with_its_own_distributed_sampler_is_sharded(ids: torch.Tensor, sharded: bool) -> None:
    class Sharding(OwnModule):
        def val_dataloader(self) -> Any:
            sampler = DistributedSampler(ids, 2, 0) if sharded else None  # type: ignore[arg-type, var-annotated]
            return DataLoader(ids, batch_size=4, sampler=sampler)  # type: ignore[arg-type]

    module = Sharding(build_model("llama"))
    run = trainer(max_steps=1)
    run.fit(module, DataLoader(ids[:8], batch_size=4))
    assert validation_batches(run)[1] == sharded


def test_a_mask_beside_token_ids_is_refused(ids: torch.Tensor) -> None:
    """Of (ids, mask) only the ids would be used, and padding would count. (ids, targets) may be given."""
    mask = torch.ones_like(ids)
    pruner = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=4, measure=False)
    trainer(pruner).fit(OwnModule(build_model("llama")), DataLoader(TensorDataset(ids, mask, ids), batch_size=4))
    segments = torch.zeros_like(ids)  # 0 at both ends is no mask
    trainer(pruner).fit(OwnModule(build_model("llama")), DataLoader(TensorDataset(ids, segments), batch_size=4))
    mask[:, -3:] = 0
    with pytest.raises(UserError, match="'attention_mask' or 'labels' for the other tensor"):
        trainer(pruner).fit(OwnModule(build_model("llama")), DataLoader(TensorDataset(ids, mask), batch_size=4))


def test_packed_files_are_not_uploaded() -> None:
    with pytest.raises(UserError, match="Set pack to false"):
        SparseLLMCallback(pack=True, push_to_hub="me/model", export_dir="out")


def test_apple_gpus_are_refused(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(SparseLLMCallback())
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("mps"))
    with pytest.raises(UserError, match=r"Set trainer\.accelerator to cpu"):
        check_trainer(run, False, tunes=True)


def test_a_static_graph_and_tuning_are_refused() -> None:
    run = trainer(SparseLLMCallback(), strategy=DDPStrategy(static_graph=True, process_group_backend="gloo"))
    with pytest.raises(UserError, match="Leave static_graph out"):
        check_trainer(run, True, tunes=True)
    check_trainer(run, False, tunes=True)
    check_trainer(run, True, tunes=False)


MAGNITUDE: dict[str, Any] = {"preset": "paper", "method": "magnitude", "num_calibration_samples": 4}


def test_the_data_of_this_fit_counts(model_dir: Path, ids: torch.Tensor) -> None:
    """Not those of an earlier fit with the same Trainer, and not the module's own."""

    class Measured(OwnModule):
        def val_dataloader(self) -> Any:
            return DataLoader(ids[:4], batch_size=4)

    first = SparseLLMCallback(**MAGNITUDE)
    run = trainer(first, num_sanity_val_steps=0, check_val_every_n_epoch=5, max_epochs=1)
    run.fit(CausalLM(str(model_dir)), datamodule=TextDataModule(sequence_length=32, max_eval_windows=4))
    loader, other = DataLoader(ids[8:16], batch_size=4), DataLoader(ids[20:32], batch_size=4)
    run.callbacks = [SparseLLMCallback(**MAGNITUDE)]
    run.should_stop = False
    module = Measured(build_model("llama"))
    run.fit(module, loader, other)
    report = run.callbacks[0].report
    assert report is not None
    assert report.perplexity["dense"] == pytest.approx(perplexity(build_model("llama"), other))
    assert report.calibration["source"] == "training dataloader"
    assert report.evaluation == {"source": "validation dataloader", "windows": 12, "length": ids.shape[1]}
    assert report.data is None


@pytest.mark.parametrize(("limit", "windows"), [(1, 4), (2, 8), (0.5, 4), (0, 8), (1.0, 8)])
def test_validation_is_limited_as_the_trainer_says(ids: torch.Tensor, limit: float, windows: int) -> None:
    pruner = SparseLLMCallback(**MAGNITUDE)
    run = trainer(pruner, num_sanity_val_steps=0, limit_val_batches=limit)
    run.fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8), DataLoader(ids[:8], batch_size=4))
    assert pruner.report is not None
    assert pruner.report.evaluation is not None
    assert pruner.report.evaluation["windows"] == windows
    assert pruner.report.perplexity["dense"] == pytest.approx(perplexity(build_model("llama"), [ids[:windows]]))


def test_a_perplexity_that_is_not_finite_is_left_out(
    tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no number for it, and the model must be written all the same."""
    monkeypatch.setattr("sparsellm_lightning.callbacks.measuring.perplexity", lambda *_, **__: math.inf)
    pruner = SparseLLMCallback(**MAGNITUDE, export_dir=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="is inf, and is not reported"):
        trainer(pruner).fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8), DataLoader(ids[:4]))
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["perplexity"]["pruned"] is None


def test_validation_without_token_ids_needs_labels(ids: torch.Tensor) -> None:
    model = build_model("llama")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[:4])
    labelled = [{"inputs_embeds": embedded, "labels": ids[:4]}]
    assert perplexity(model, labelled) == pytest.approx(perplexity(model, [ids[:4]]))
    with pytest.raises(UserError, match=r"need labels or input_ids, but the batches hold inputs_embeds\."):
        perplexity(model, [{"inputs_embeds": embedded}])


def test_a_smaller_model_is_written_twice(tmp_path: Path, ids: torch.Tensor) -> None:
    """The second report says what the first one says: rows of blocks are not numbered anew a second time."""
    pruner = SparseLLMCallback(
        preset="paper", method="wanda", pattern={"blocks": 1}, num_calibration_samples=4, measure=False
    )
    module, reports = OwnModule(build_model("llama")), []
    for name in ("first", "second"):
        pruner.export_dir = str(tmp_path / name)
        trainer(pruner).fit(module, DataLoader(ids, batch_size=8))
        reports.append(json.loads((tmp_path / name / "pruning_report.json").read_text()))
        assert "0.00 % zeros" in (tmp_path / name / "README.md").read_text()
        assert "0.00 % zeros" in (tmp_path / name / "report.html").read_text()
    assert reports[0]["layers"] == reports[1]["layers"]
    assert reports[0]["sparsity"] == reports[1]["sparsity"]
    assert reports[0]["sparsity"]["exported"] == 0 < reports[0]["sparsity"]["achieved"]


def test_a_model_that_is_dense_again_is_pruned_again(ids: torch.Tensor) -> None:
    pruner, module = SparseLLMCallback(**MAGNITUDE), OwnModule(build_model("llama"))
    for _ in range(2):
        module.backbone.load_state_dict(build_model("llama").state_dict())
        trainer(pruner).fit(module, DataLoader(ids, batch_size=8))
        assert zeros(module.backbone) == pytest.approx(0.5, abs=0.01)


def test_a_baseline_that_fails_leaves_the_dense_model(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    module, dense = OwnModule(build_model("llama")), build_model("llama")

    def fail(model: PreTrainedModel, *args: Any, **kwargs: Any) -> float:
        if zeros(model):
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr("sparsellm_lightning.callbacks.measuring.perplexity", fail)
    run = trainer(SparseLLMCallback(**MAGNITUDE, baseline=True))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(module, DataLoader(ids, batch_size=8), DataLoader(ids[:4]))
    assert all(torch.equal(a, b) for a, b in zip(module.backbone.parameters(), dense.parameters(), strict=True))


def test_an_export_changes_no_random_numbers(tmp_path: Path, model_dir: Path, ids: torch.Tensor) -> None:
    """Its examples are the beginnings of windows of the user's own loader."""
    states: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            states.append(torch.get_rng_state())

    for export_dir in (None, str(tmp_path / "out")):
        pl.seed_everything(0, verbose=False)
        pruner = SparseLLMCallback(**MAGNITUDE, finetune=True, export_dir=export_dir)
        windows = DataLoader([{"input_ids": row, "labels": row} for row in ids[:16]], batch_size=4, shuffle=True)
        run = trainer(pruner, Watch(), max_steps=1, num_sanity_val_steps=0)
        run.fit(CausalLM(str(model_dir)), windows, windows)
    assert pruner.report is not None
    assert pruner.report.examples
    assert torch.equal(*states)


def test_a_tokenizer_that_the_datamodule_names_is_exported(tmp_path: Path, model_dir: Path) -> None:
    data = TextDataModule("self", sequence_length=32, batch_size=4, tokenizer=str(model_dir))
    trainer(SparseLLMCallback(**MAGNITUDE, export_dir=str(tmp_path / "out"))).fit(
        OwnModule(load_model(str(model_dir))), data
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("for x in y")["input_ids"]


def test_the_trainer_can_be_pickled_while_it_prunes(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are not forked get it, if the user's collate function belongs to the datamodule."""
    held, pickled = SparseLLMCallback(**MAGNITUDE), []
    monkeypatch.setattr(
        "sparsellm_lightning.callbacks.reports.log_block", lambda trainer, result: pickled.append(pickle.dumps(trainer))
    )
    trainer(held, precision="bf16-true").fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8))
    again, model = pickle.loads(pickled[1]), build_model("llama")
    assert again.precision_plugin.convert_module(model) is model
    assert model.dtype == torch.bfloat16


def test_the_callback_can_be_pickled_while_it_trains(tmp_path: Path, ids: torch.Tensor) -> None:
    pickled: list[bytes] = []

    class Pickling(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            pickled.append(pickle.dumps((trainer.callbacks[0], trainer.lightning_module)))  # type: ignore[attr-defined]

    pruner = SparseLLMCallback(**MAGNITUDE, finetune=True, export_dir=str(tmp_path / "out"))
    module, watch = OwnModule(build_model("llama")), Pickling()
    trainer(pruner, watch, Distillation(), max_steps=2).fit(module, DataLoader(ids, batch_size=8))
    assert len(pickled) == 2
    again, there = pickle.loads(pickled[1])
    assert again.config == pruner.config
    assert there.batches_seen == 2


def test_a_pickled_callback_knows_what_it_has_pruned(ids: torch.Tensor) -> None:
    """Spawned processes get both, and do not prune again."""
    pruner, module = SparseLLMCallback(**MAGNITUDE), OwnModule(build_model("llama"))
    trainer(pruner).fit(module, DataLoader(ids, batch_size=8))
    module.trainer = None  # type: ignore[assignment]
    again, there = pickle.loads(pickle.dumps((pruner, module)))
    assert again._has_pruned(there)


def test_an_export_is_made_on_the_host(tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller models are copies, for which an accelerator may have no room. Afterwards the model is where it was."""
    model, moves = build_model("llama"), []

    def refuse(*_: Any) -> None:
        moves.append("shrink")
        raise UserError("Its head sizes differ.")

    monkeypatch.setattr(type(model), "cpu", lambda self: moves.append("cpu"))
    monkeypatch.setattr(exporting, "shrink", refuse)
    monkeypatch.setattr(exporting, "export_or_rescue", lambda *_: moves.append("export"))
    monkeypatch.setattr(type(model), "to", lambda self, *_: moves.append("back") or self)
    pruner = SparseLLMCallback(**{**MAGNITUDE, "pattern": "heads", "sparsity": 0.5}, export_dir=str(tmp_path / "out"))
    trainer(pruner).fit(OwnModule(model), DataLoader(ids, batch_size=8))
    assert moves == ["cpu", "shrink", "export", "back"]


def test_an_export_that_fails_leaves_the_figures(tmp_path: Path, ids: torch.Tensor) -> None:
    run = trainer(SparseLLMCallback(**MAGNITUDE, export_dir=str(tmp_path / "out")))
    with (
        mock.patch("sparsellm_lightning.callbacks.exporting.export_or_rescue", side_effect=UserError("full")),
        pytest.raises(UserError, match="full"),
    ):
        run.fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8))
    assert float(run.callback_metrics["prune/sparsity"]) == pytest.approx(0.5, abs=0.01)


def test_a_logger_that_fails_leaves_the_export(tmp_path: Path, ids: torch.Tensor) -> None:
    class Failing(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "prune/sparsity" in metrics:
                raise OSError("the server is gone")

    pruner = SparseLLMCallback(**MAGNITUDE, export_dir=str(tmp_path / "out"))
    with pytest.raises(OSError, match="the server is gone"):
        trainer(pruner, logger=Failing(tmp_path / "logs")).fit(
            OwnModule(build_model("llama")), DataLoader(ids, batch_size=8)
        )
    assert zeros(load_model(tmp_path / "out")) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("pattern", ["neurons", "heads"])
def test_a_model_with_a_part_that_its_class_does_not_have(tmp_path: Path, pattern: str, ids: torch.Tensor) -> None:
    """The smaller model is made from the class. It is refused before the run."""
    model = build_model("llama")
    model.value_head = torch.nn.Linear(64, 1)
    pruner = SparseLLMCallback(pattern=pattern, sparsity=0.5, export_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"other parameters, such as value_head\.bias"):
        trainer(pruner).fit(OwnModule(model), DataLoader(ids, batch_size=8))


def test_a_smaller_classifier(tmp_path: Path, ids: torch.Tensor) -> None:
    """Its class cannot generate, so that it has no settings for that."""
    config = copy.deepcopy(build_model("llama").config)
    model = LlamaForSequenceClassification(config).eval()

    class Classifier(OwnModule):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.backbone(batch, labels=batch[:, 0] % 2).loss

    settings: dict[str, Any] = {**MAGNITUDE, "pattern": "neurons", "sparsity": 0.25, "round_to": 32}
    trainer(SparseLLMCallback(**settings, export_dir=str(tmp_path / "out"))).fit(
        Classifier(model), DataLoader(ids, batch_size=8)
    )
    smaller = LlamaForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert smaller.config.intermediate_size == 96
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids[:2]).logits, model(ids[:2]).logits)


def test_a_smaller_model_with_a_head_of_its_own(tmp_path: Path, ids: torch.Tensor) -> None:
    """Its configuration ties the head to the embeddings, but its files hold two, which transformers leaves untied."""
    model = build_model("llama")
    model.config.tie_word_embeddings = True
    settings: dict[str, Any] = {**MAGNITUDE, "pattern": "neurons", "sparsity": 0.25, "round_to": 32}
    trainer(SparseLLMCallback(**settings, export_dir=str(tmp_path / "out"))).fit(
        OwnModule(model), DataLoader(ids, batch_size=8)
    )
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids[:2]).logits, model.eval()(ids[:2]).logits)


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pruner = SparseLLMCallback(export_dir="~/out", resume_dir="~/journal")
    assert pruner.export_dir == str(tmp_path / "out")
    assert pruner.resume_dir == str(tmp_path / "journal")


@pytest.mark.parametrize("settings", [{"logger": True}, {"enable_checkpointing": True}], ids=["logs", "checkpoints"])
def test_what_the_run_writes_lies_outside_the_export(
    tmp_path: Path, ids: torch.Tensor, settings: dict[str, Any]
) -> None:
    pruner = SparseLLMCallback(**MAGNITUDE, export_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="must not lie inside export_dir"):
        trainer(pruner, default_root_dir=tmp_path / "out", **settings).fit(
            OwnModule(build_model("llama")), DataLoader(ids, batch_size=8)
        )


@pytest.mark.parametrize("settings", [{"pattern": "2:4"}, {"sparsity": 0.6, "ignore": ["down_proj"], "seed": 3}])
def test_the_baseline_has_the_settings_of_the_run(
    settings: dict[str, Any], ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PruningConfig] = []
    monkeypatch.setattr(
        "sparsellm_lightning.callbacks.measuring.prune_model",
        lambda model, batches, config, **more: asked.append(config) or prune_model(model, batches, config, **more),
    )
    held = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=8, baseline=True, **settings)
    trainer(held).fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8), DataLoader(ids[:4]))
    assert asked == [PruningConfig(preset="paper", method="sparsegpt", num_calibration_samples=8, **settings)]


def test_every_stage_has_a_journal_of_its_own(tmp_path: Path, ids: torch.Tensor) -> None:
    stages: dict[str, Any] = {"schedule": {0: 0.5, 2: 0.6}, "finetune": True, "resume_dir": str(tmp_path / "journal")}
    held = SparseLLMCallback(preset="paper", method="magnitude", num_calibration_samples=8, measure=False, **stages)
    trainer(held, max_steps=3).fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=4))
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["stage-0", "stage-1"]


def test_a_run_that_only_prunes_makes_no_training_windows(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large text, tokenising them would take longer than pruning. Also if the Trainer limits the batches."""
    made: list[str] = []
    windows = TextDataModule._consecutive_windows
    monkeypatch.setattr(
        TextDataModule, "_consecutive_windows", lambda self, *args: made.append(args[0]) or windows(self, *args)
    )
    settings: dict[str, Any] = {"preset": "paper", "method": "magnitude", "num_calibration_samples": 8}
    for finetune in (False, True):
        data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=8, max_eval_windows=4)
        pruner = SparseLLMCallback(**settings, finetune=finetune)
        trainer(pruner, max_steps=1, limit_train_batches=0.5).fit(CausalLM(str(model_dir)), data)
        assert pruner.report is not None
        assert ("train" in made) == finetune
        assert len(data.train_dataloader()) == 2, "behind the run there are windows"
        trainer(SparseLLMCallback(**settings), val_check_interval=5000).fit(
            CausalLM(str(model_dir)), TextDataModule(sequence_length=32, max_eval_windows=4)
        )
        made.clear()


def test_processes_that_would_take_the_result_with_them() -> None:
    run = trainer(strategy="ddp_spawn", devices=2)
    with pytest.raises(UserError, match="Processes that Lightning spawns or forks"):
        check_launcher(run, CausalLM("model"), None)
    with pytest.warns(UserWarning, match="Read it from the files in export_dir"):
        check_launcher(run, CausalLM("model"), "out")
    check_launcher(run, OwnModule(build_model("llama")), None)


def test_a_trainer_of_the_other_package() -> None:
    other = pytest.importorskip("pytorch_lightning")
    run = other.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"a Trainer of lightning\.pytorch, got one of pytorch_lightning"):
        adapter_for(run)


def test_sparse_weights_with_blocks_that_left(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Their zeros, and those of their biases, are kept, although they are zeros only."""
    model = build_model("opt")
    layer = model.model.decoder.layers[1]
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.zero_()
                module.bias.zero_()
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    module = CausalLM(weights=str(tmp_path / "in"), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=8, max_eval_windows=4)
    held = SparseLLMCallback(pattern="blocks", measure=False)
    trainer(held, max_steps=2).fit(module, data)
    assert {"model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2.bias"} <= held._zeros.keys()
    layer = module.model.model.decoder.layers[1]
    assert not any(bool(p.any()) for m in layer.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters())


def test_a_gradual_run_reports_all_stages(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keeps the name of the model."""
    seen: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        report = prune_model(*args, **kwargs)
        seen.append((report.wall_seconds, dict(report.phases), copy.deepcopy(report.work)))
        return report

    monkeypatch.setattr(PRUNE_MODEL, noted)
    module: Any = OwnModule(build_model("llama"))
    module.pretrained = "my/model"
    settings: dict[str, Any] = {"schedule": {0: 0.5, 2: 0.6}, "finetune": True, "num_calibration_samples": 4}
    held = SparseLLMCallback(preset="paper", method="magnitude", measure=False, **settings)
    trainer(held, max_steps=3).fit(module, DataLoader(ids, batch_size=4))
    assert held.report is not None
    assert len(seen) == 2
    assert held.report.wall_seconds == pytest.approx(sum(seconds for seconds, *_ in seen))
    for name in ("forward", "local_solve"):
        assert held.report.phases[name] == pytest.approx(sum(phases[name] for _, phases, _ in seen))
    assert held.report.model == "my/model"
    card = model_card(held.report)
    assert "sparsellm prune --config FILE" not in card
    assert "pruned in stages at the steps 0, 2 and then fine-tuned. Settings of the last pruning" in card
    assert held.report.work["forward"]["float32"] == sum(work["forward"]["float32"] for *_, work in seen)
    held.report.phase_table()


def test_a_checkpoint_of_a_fine_tuned_model_is_exported_without_training(tmp_path: Path, model_dir: Path) -> None:
    settings: dict[str, Any] = {
        "preset": "paper",
        "method": "magnitude",
        "num_calibration_samples": 8,
        "measure": False,
    }

    def data() -> TextDataModule:
        return TextDataModule(sequence_length=32, batch_size=4, max_train_windows=16, max_eval_windows=4)

    run = trainer(SparseLLMCallback(**settings, finetune=True), max_steps=1)
    trained = CausalLM(str(model_dir))
    run.fit(trained, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    pruner = SparseLLMCallback(**settings, export_dir=str(tmp_path / "out"))
    trainer(pruner, max_steps=4).fit(CausalLM(str(model_dir)), data(), ckpt_path=str(tmp_path / "a.ckpt"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for one, other in zip(exported.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(one, other)
