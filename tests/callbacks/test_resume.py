"""Runs that were stopped or killed and resumed end with every bit of an uninterrupted run's weights and optimizer.

New runs from sparse weights are here too. They resume nothing.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import resume_job
from support.cli import sparsellm
from support.models import CONFIGS, build_model
from support.training import Module, ZeroWatch, linear_weights, prune_by_hand, trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, OPTForCausalLM, PreTrainedTokenizerFast

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    LoraOptions,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    prune_model,
    verify_export,
)
from sparsellm_lightning.callbacks import reports

STEPS = 12
EPOCH = 5  # batches


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Tensors are bit-equal, everything else is equal, all the way down."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), f"{path}: {int((left != right).sum())} of {left.numel()} differ"
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


@pytest.fixture(scope="session")
def dropout_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny OPT with dropout everywhere."""
    folder = tmp_path_factory.mktemp("tiny-opt")
    config = copy.deepcopy(CONFIGS["opt"])
    config.dropout = config.attention_dropout = 0.1
    model = OPTForCausalLM(config)
    model.load_state_dict(build_model("opt").state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_epochs_of_a_resumed_run_differ(dropout_dir: Path, tmp_path: Path) -> None:
    """A run that resumes from the end of an epoch goes on with the next epoch's order."""

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.batches: list[Any] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, torch.Tensor], index: int) -> None:
            self.batches.append(batch["input_ids"].tolist())

    def run(ckpt_path: Path | None = None) -> list[Any]:
        watch, saving = Watch(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=4 * EPOCH, max_eval_windows=4)
        fit = trainer(
            *(SparseLLMCallback(preset="paper", method="magnitude", sparsity=0.6, finetune=True), watch, saving),
            max_epochs=3,
            limit_val_batches=0,
            enable_checkpointing=True,
        )
        fit.fit(CausalLM(str(dropout_dir)), data, ckpt_path=ckpt_path)
        return watch.batches

    whole = run()
    assert len(whole) == 3 * EPOCH
    assert run(tmp_path / "epoch=0.ckpt") == whole[EPOCH:]


class StopAt(pl.Callback):
    """Ends a run early that has more steps to go."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Run:
    """What one kind of run is made of; started as often as a test likes, each time from nothing."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.model, self.options = model, options

    def __call__(
        self, steps: int, *callbacks: pl.Callback, ckpt_path: Path | None = None, seed: int = 0
    ) -> tuple[pl.Trainer, CausalLM]:
        pl.seed_everything(seed, verbose=False)
        options = self.options
        module = CausalLM(
            str(self.model),
            optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=3e-3, total_steps=STEPS),
            lora=options.get("lora"),
        )
        data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=4 * EPOCH, max_eval_windows=4)
        fit = trainer(
            self.pruner(),
            *([Distillation()] if options.get("distilled") else []),
            *callbacks,
            max_steps=steps,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            limit_val_batches=options.get("validation", 0),
            num_sanity_val_steps=0,
            accumulate_grad_batches=options.get("accumulate", 1),
        )
        fit.fit(module, data, ckpt_path=ckpt_path)
        return fit, module

    def pruner(self) -> SparseLLMCallback:
        schedule = self.options.get("schedule")
        settings: dict[str, Any] = {"sparsity": 0.6} if schedule is None else {"schedule": schedule}
        return SparseLLMCallback(
            preset="paper",
            method="wanda",
            **settings,
            finetune=True,
            num_calibration_samples=8,
            measure=bool(schedule),
        )


def result(run: tuple[pl.Trainer, CausalLM]) -> dict[str, Any]:
    """All that must be the same: weights, optimizer, schedule, progress, and what was pruned when."""
    fit, module = run
    (held,) = (callback for callback in fit.callbacks if isinstance(callback, SparseLLMCallback))
    assert held.report is not None
    return {
        "weights": module.state_dict(),
        "optimizer": fit.optimizers[0].state_dict(),
        "scheduler": fit.lr_scheduler_configs[0].scheduler.state_dict(),
        "step": fit.global_step,
        "stages": held.report.stages,
        "layers": held.report.layers,
    }


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every solve from here on."""
    seen: list[Any] = []
    monkeypatch.setattr(reports, "prune_model", lambda *a, **k: seen.append(a) or prune_model(*a, **k))
    return seen


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout-validated": {"dropout": True, "validation": 1.0},
    "dropout-accumulated": {"dropout": True, "accumulate": 2},
    "gradual": {"schedule": {0: 0.5, 4: 0.6, 8: 0.7}, "dropout": True},
    "lora": {"lora": LoraOptions(rank=4, dropout=0.1)},
    "distilled": {"distilled": True},
}
# Steps to stop at. An epoch has five batches: step 3 is inside the first epoch, 5 at its end, 7 inside the second, 10 at its
# end. With two batches a step, an epoch has three steps. Stages come at steps 4 and 8.
STOPS = {
    "plain": (3, 5, 10),
    "dropout-validated": (5, 7),
    "dropout-accumulated": (3, 4),
    "gradual": (4, 6),
    "lora": (7,),
    "distilled": (7,),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_are_bit_equal(
    tmp_path: Path, model_dir: Path, dropout_dir: Path, solves: list[Any], kind: str
) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    options = KINDS[kind]
    run = Run(dropout_dir if options.get("dropout") else model_dir, **options)
    expected = result(run(STEPS))
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    assert_same(result(run(STEPS, checkpoints)), expected, "saving changes nothing: ")
    for stop in STOPS[kind]:
        # One checkpoint is of ModelCheckpoint in the middle of a run, the other of a run that ended at this step.
        names = [f"step={stop}.ckpt"]
        # When max_steps ends an epoch of accumulated batches, Lightning trains one more batch of it, in a step of its own.
        if not (options.get("accumulate") and stop % 3 == 0):
            short, _ = run(STEPS, StopAt(stop)) if "schedule" in options else run(stop)
            short.save_checkpoint(tmp_path / f"stopped-{stop}.ckpt")
            names.append(f"stopped-{stop}.ckpt")
        for name in names:
            solves.clear()
            resumed = run(STEPS, ckpt_path=tmp_path / name, seed=99)
            assert_same(result(resumed), expected, f"{name}: ")
            stages = options.get("schedule", {})
            assert len(solves) == sum(step >= stop for step in stages), "stages that were still to come"


def test_a_finished_run_is_exported_later(tmp_path: Path, model_dir: Path) -> None:
    """From a checkpoint of the last step, after which Lightning trains nothing."""
    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=20, max_eval_windows=4)

    def run(steps: int, **settings: Any) -> tuple[pl.Trainer, CausalLM, SparseLLMCallback]:
        module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        held = SparseLLMCallback(preset="paper", method="wanda", finetune=True, num_calibration_samples=8, **settings)
        return trainer(held, max_steps=steps), module, held

    fit, module, first = run(3)
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again, other, second = run(3, export_dir=str(tmp_path / "out"))
    again.fit(other, data, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert first.report is not None
    assert second.report is not None
    assert second.report.perplexity == pytest.approx(first.report.perplexity)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for tensor, expected in zip(written.parameters(), module.model.parameters(), strict=True):
        assert torch.equal(tensor, expected)
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["mask_check"]["checks"] > 0


def test_perplexities_of_two_texts_do_not_stand_together(tmp_path: Path, model_dir: Path) -> None:
    def run(steps: int, windows: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, SparseLLMCallback]:
        module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        held = SparseLLMCallback(
            preset="paper",
            method="wanda",
            finetune=True,
            num_calibration_samples=8,
            export_dir=str(tmp_path / f"{steps}"),
        )
        fit = trainer(held, max_steps=steps)
        data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=20, max_eval_windows=windows)
        fit.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
        return fit, held

    fit, _ = run(2, 4)
    fit.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="was measured on 4 windows of 32 tokens of .* before, and on 2 windows of 32"):
        _, held = run(3, 2, tmp_path / "two.ckpt")
    assert held.report is not None
    assert held.report.perplexity["dense"] is held.report.perplexity["pruned"] is None
    assert held.report.perplexity["finetuned"] is not None
    assert [set(example) for example in held.report.examples] == [{"prompt", "finetuned"}] * 2


def test_dropout_makes_a_difference(dropout_dir: Path) -> None:
    """The model with dropout depends on the random state, which the tests above need."""
    run = Run(dropout_dir)
    first, second = (run(2, seed=seed)[1].state_dict() for seed in (0, 1))
    assert not torch.equal(
        first["model.model.decoder.layers.0.fc1.weight"], second["model.model.decoder.layers.0.fc1.weight"]
    )


def test_resumed_twice(tmp_path: Path, dropout_dir: Path, solves: list[Any]) -> None:
    run = Run(dropout_dir)
    expected = result(run(STEPS))
    path = None
    for stop in (2, 5, 8, STEPS):
        fit, module = run(stop, ckpt_path=path, seed=0 if path is None else 99)
        path = tmp_path / f"{stop}.ckpt"
        fit.save_checkpoint(path)
    assert_same(result((fit, module)), expected)
    assert len(solves) == 2, "the reference and the first part"


def test_sparse_finetuning_resumes(tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """``SparseFinetuning`` resumes a run of a model that was pruned elsewhere. The resumed module is built dense."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    prune_by_hand(model)
    model.save_pretrained(tmp_path / "sparse")
    tokenizer.save_pretrained(tmp_path / "sparse")

    def run(source: Path, steps: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, CausalLM, ZeroWatch]:
        module = CausalLM(str(source), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=20)
        watch = ZeroWatch()
        fit = trainer(SparseFinetuning(), watch, max_steps=steps, limit_val_batches=0)
        fit.fit(module, data, ckpt_path=ckpt_path)
        return fit, module, watch

    whole, expected, _ = run(tmp_path / "sparse", 8)
    short, *_ = run(tmp_path / "sparse", 3)
    short.save_checkpoint(tmp_path / "stopped.ckpt")
    fit, module, watch = run(model_dir, 8, tmp_path / "stopped.ckpt")
    assert_same(module.state_dict(), expected.state_dict())
    assert_same(fit.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert watch.sparsity() == pytest.approx(0.6, abs=0.01)
    assert watch.looks == 5 * 3 + 1


def test_a_mixing_optimizer_resumes_with_its_masks(tmp_path: Path, text, calibration) -> None:
    """The optimizer sets kept weights to zero. They are not among the masks of the resumed run."""
    model = build_model("llama")
    prune_by_hand(model)
    start = {name: weight.detach() == 0 for name, weight in linear_weights(model).items()}

    class Zeroing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(torch.rand_like(p) > 0.2)
            return loss

    loader = DataLoader(torch.cat([batch["input_ids"] for batch in calibration]), batch_size=4)
    fit = trainer(SparseFinetuning(), max_steps=3)
    fit.fit(Module(model, lambda p: Zeroing(p, lr=0.01)), loader)
    fit.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Module(build_model("llama"), lambda p: Zeroing(p, lr=0.01))
    trainer(SparseFinetuning(), max_steps=6).fit(resumed, loader, ckpt_path=tmp_path / "stopped.ckpt")
    for name, weight in linear_weights(resumed.backbone).items():
        assert torch.equal(weight.detach() == 0, start[name]), name


@pytest.mark.parametrize(
    ("callback", "more"), [("pruner", True), ("alone", False)], ids=["zeros became 0.25", "kept weights became zero"]
)
def test_tampered_zeros_are_refused(tmp_path: Path, model_dir: Path, callback: str, more: bool) -> None:
    run = Run(model_dir)
    if callback == "alone":
        first, _ = run(2)
        sparse = tmp_path / "sparse.ckpt"
        first.save_checkpoint(sparse, weights_only=True)
        run.pruner = SparseFinetuning  # type: ignore[method-assign, assignment]
        module = CausalLM(str(model_dir), weights=str(sparse))
        fit = trainer(SparseFinetuning(), max_steps=2, limit_val_batches=0)
        fit.fit(module, TextDataModule(sequence_length=32, batch_size=4))
    else:
        fit, module = run(2)
    path = tmp_path / "stopped.ckpt"
    fit.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    key = "model.model.layers.1.mlp.up_proj.weight"
    weight = checkpoint["state_dict"][key].view(-1)
    zeros = int((weight == 0).sum())
    chosen = ((weight == 0) if more else (weight != 0)).nonzero().flatten()[:3]
    weight[chosen] = 0.25 if more else 0.0
    torch.save(checkpoint, path)
    found = zeros - 3 if more else zeros + 3
    with pytest.raises(UserError, match=rf"saved with {zeros} zeros in \S*layers\.1\.mlp\.up_proj,.* have {found}"):
        run(4, ckpt_path=path)


# -- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as the processes have, so that sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unkilled(one_thread: None, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    fit, module, lines = resume_job.run(str(model_dir), str(tmp_path_factory.mktemp("unkilled")))
    return (module.state_dict(), fit.optimizers[0].state_dict()), lines


def start(options: Path, *more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, resume_job.__file__, str(options), *map(str, more)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "saved", "process"),
    [
        ("solve 0 block 1 iteration 1", None, False),
        ("solve 1 block 1 iteration 0", 4, False),  # the second stage
        ("step 7", 6, True),
    ],
    ids=["first solve", "second solve", "training"],
)
def test_killed_and_started_again(
    tmp_path: Path, model_dir: Path, unkilled: tuple[Any, list[str]], moment: str, saved: int | None, process: bool
) -> None:
    expected, lines = unkilled
    folder = tmp_path / "checkpoints"
    options = {"model": str(model_dir), "folder": str(folder), "stop_at": moment}
    (tmp_path / "options.json").write_text(json.dumps(options))
    job = start(tmp_path / "options.json")
    assert job.stdout is not None
    seen = []
    for line in job.stdout:
        seen.append(line.rstrip())
        if seen[-1] == moment:
            break
    job.send_signal(signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == -signal.SIGKILL, errors[-3000:]
    assert seen == lines[: lines.index(moment) + 1]
    assert (folder / "last.ckpt").exists() == (saved is not None)
    if saved is not None:
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == saved

    if process:
        (tmp_path / "options.json").write_text(json.dumps({**options, "stop_at": "never"}))
        job = start(tmp_path / "options.json", "save", tmp_path / "result.pt")
        output, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors[-3000:]
        again, found = output.split("\n")[:-1], torch.load(tmp_path / "result.pt", weights_only=True)
    else:
        fit, module, again = resume_job.run(str(model_dir), str(folder))
        found = (module.state_dict(), fit.optimizers[0].state_dict())
    assert_same(found, expected)
    # Only the interrupted solve is done again.
    solved = 0 if saved is None else 1 + (saved > 5)
    assert [line.replace("solve 0", f"solve {solved}") for line in again if line.startswith("solve")] == [
        line for line in lines if line.startswith("solve") and int(line.split()[1]) >= solved
    ]
    assert [line for line in again if line.startswith("step")] == [f"step {step}" for step in range(saved or 0, 10)]


# -- new runs from sparse weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned and shortly trained model in every form that ``weights`` takes."""
    folder = tmp_path_factory.mktemp("sparse")
    paths = {"folder": folder / "out", "full": folder / "full.ckpt", "weights only": folder / "weights.ckpt"}
    module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    held = SparseLLMCallback(
        preset="paper",
        method="magnitude",
        sparsity=0.6,
        finetune=True,
        num_calibration_samples=8,
        export_dir=str(paths["folder"]),
    )
    fit = trainer(held, max_steps=2)
    fit.fit(module, TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4))
    fit.save_checkpoint(paths["full"])
    fit.save_checkpoint(paths["weights only"], weights_only=True)
    torch.save(module.state_dict(), folder / "expected.pt")
    return {**paths, "expected": folder / "expected.pt"}


def high_sparsity() -> SparseLLMCallback:
    return SparseLLMCallback(preset="paper", sparsity=0.9)


@pytest.mark.parametrize(
    ("form", "make"), [("folder", high_sparsity), ("full", SparseFinetuning), ("weights only", high_sparsity)]
)
def test_a_new_run_from_sparse_weights(
    model_dir: Path, sparse: dict[str, Path], solves: list[Any], form: str, make: Callable[[], pl.Callback]
) -> None:
    pretrained = None if form == "folder" else str(model_dir)
    module = CausalLM(pretrained, weights=str(sparse[form]), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    expected = torch.load(sparse["expected"])

    class First(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step == 0:
                assert_same(dict(pl_module.state_dict()), dict(expected))
                assert not trainer.optimizers[0].state
                assert trainer.current_epoch == 0

    watch, held = ZeroWatch(), make()
    fit = trainer(First(), watch, held, max_steps=3)
    fit.fit(module, TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4))
    assert watch.steps == 3
    assert {int(state["step"]) for state in fit.optimizers[0].state.values()} == {3}
    assert watch.looks == 3 * 3 + 1
    assert watch.moved(module) > 0.98
    for name, start in watch.start.items():
        assert torch.equal(start, expected[f"{name}.weight"])
    assert not solves
    if isinstance(held, SparseLLMCallback):
        assert held.report is not None
        assert held.report.sparsity["achieved"] == pytest.approx(0.6, abs=0.002)
        assert held.report.sparsity["requested"] == held.report.sparsity["achieved"]
        assert held.report.perplexity["dense"] is None
        assert held.report.perplexity["finetuned"] is not None


def test_a_run_from_sparse_weights_resumes(tmp_path: Path, model_dir: Path, sparse: dict[str, Path]) -> None:
    def run(steps: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, CausalLM]:
        optimizer = lambda p: torch.optim.AdamW(p, lr=1e-3)  # noqa: E731
        module = CausalLM(str(model_dir), weights=str(sparse["full"]), optimizer=optimizer)
        fit = trainer(SparseLLMCallback(preset="paper", measure=False), max_steps=steps, limit_val_batches=0)
        fit.fit(module, TextDataModule(sequence_length=32, batch_size=4, max_train_windows=12), ckpt_path=ckpt_path)
        return fit, module

    whole, expected = run(5)
    short, _ = run(2)
    short.save_checkpoint(tmp_path / "stopped.ckpt")
    fit, module = run(5, tmp_path / "stopped.ckpt")
    assert_same(module.state_dict(), expected.state_dict())
    assert_same(fit.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


def test_weights_from_an_averaged_run(tmp_path: Path, model_dir: Path, sparse: dict[str, Path]) -> None:
    """The weights in such a checkpoint are the averages, with the same zeros. A resumed run continues from the raw weights."""

    def run(steps: int, **where: Any) -> tuple[pl.Trainer, CausalLM]:
        module = CausalLM(None, weights=str(sparse["folder"]), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [SparseFinetuning(), EMAWeightAveraging(decay=0.5), saver]
        fit = trainer(*callbacks, max_steps=steps, limit_val_batches=0, enable_checkpointing=True)
        fit.fit(module, TextDataModule(sequence_length=32, batch_size=4, max_train_windows=12), **where)
        return fit, module

    whole, expected = run(4)
    fit, module = run(4, ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(module.state_dict(), expected.state_dict())
    assert_same(fit.optimizers[0].state_dict(), whole.optimizers[0].state_dict())

    zeros = torch.load(sparse["expected"])
    again = CausalLM(str(model_dir), weights=str(tmp_path / "step=2.ckpt"))
    again.configure_model()
    for name, weight in linear_weights(again).items():
        assert torch.equal(weight.detach() == 0, zeros[f"{name}.weight"] == 0)


def test_weights_that_cannot_be(tmp_path: Path, model_dir: Path, sparse: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="neither pretrained nor weights"):
        CausalLM()
    with pytest.raises(UserError, match=r"does not say of which model\. Set pretrained"):
        CausalLM(weights=str(sparse["full"])).configure_model()
    with pytest.raises(UserError, match=r"nowhere\.ckpt does not exist"):
        CausalLM(str(model_dir), weights=str(tmp_path / "nowhere.ckpt")).configure_model()
    with pytest.raises(UserError, match="nowhere does not exist"):
        CausalLM(str(model_dir), weights=str(tmp_path / "nowhere")).configure_model()
    build_model("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match="checkpoint of the model that pretrained names"):
        CausalLM(str(tmp_path / "opt"), weights=str(sparse["full"])).configure_model()
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="weights must be a checkpoint"):
        CausalLM(str(model_dir), weights=str(tmp_path / "broken.ckpt")).configure_model()
    torch.save({"other": 1}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="weights must be a checkpoint"):
        CausalLM(str(model_dir), weights=str(tmp_path / "other.ckpt")).configure_model()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SparseFinetuning, "no linear layer of CausalLM has 1 % of zeros"),
        (SparseLLMCallback, "must name a sparse model"),
    ],
    ids=["alone", "pruner"],
)
def test_dense_weights_are_refused(model_dir: Path, make: Callable[[], pl.Callback], message: str) -> None:
    """``weights`` must name a sparse model, because no zeros would be kept in a dense one."""
    module = CausalLM(weights=str(model_dir))
    with pytest.raises(UserError, match=message):
        trainer(make(), max_steps=1).fit(module, TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4))


def test_weights_on_the_command_line(tmp_path: Path, sparse: dict[str, Path]) -> None:
    run = sparsellm(
        *("fit", "--model.weights", sparse["folder"], "--trainer.max_steps", 2, "--trainer.accelerator", "cpu"),
        *("--trainer.enable_checkpointing", "false", "--trainer.logger", "false"),
        *("--data.sequence_length", 32, "--data.batch_size", 4, "--data.max_eval_windows", 4),
        *("--pruner.export_dir", tmp_path / "out", "--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3"),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before = AutoModelForCausalLM.from_pretrained(sparse["folder"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert list(before) == list(after)
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0), name
        assert not torch.equal(weight, after[name]), name
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert report["method"] == "already sparse"
    assert f"{report['perplexity']['finetuned']:.2f}" in run.stdout
    assert report["mask_check"]["checks"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("settings", [{"schedule": {0: 0.5, 2: 0.6}}, {"baseline": True}], ids=["schedule", "baseline"])
def test_sparse_weights_are_not_pruned(sparse: dict[str, Path], settings: dict[str, Any]) -> None:
    held = SparseLLMCallback(preset="paper", finetune=True, **settings)
    module = CausalLM(weights=str(sparse["folder"]))
    data = TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4)
    with pytest.raises(UserError, match="weights names a sparse model, which is not pruned"):
        trainer(held, max_steps=3).fit(module, data)


def test_the_pattern_of_sparse_weights_is_not_that_of_the_settings(tmp_path: Path, sparse: dict[str, Path]) -> None:
    held = SparseLLMCallback(preset="paper", pattern="2:4", export_dir=str(tmp_path / "out"))
    data = TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=4)
    trainer(held, max_steps=1).fit(CausalLM(weights=str(sparse["folder"])), data)
    assert verify_export(str(tmp_path / "out")) == []
    assert (
        "Perplexity on 4 windows of 32 tokens of `python-docs, test split`" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize("first", [True, False], ids=["averages first", "pruner first"])
def test_a_finished_run_with_averages_is_exported_later(tmp_path: Path, model_dir: Path, first: bool) -> None:
    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=20, max_eval_windows=4)

    def run(out: str, ckpt_path: Path | None = None) -> pl.Trainer:
        held = SparseLLMCallback(
            preset="paper", method="wanda", finetune=True, num_calibration_samples=8, export_dir=str(tmp_path / out)
        )
        average = EMAWeightAveraging(decay=0.5)
        fit = trainer(*((average, held) if first else (held, average)), Saving(tmp_path / "last.ckpt"), max_steps=3)
        module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        fit.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
        return fit

    run("first")
    run("later", tmp_path / "last.ckpt")
    expected, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "later"))
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other)


class Saving(pl.Callback):
    """Saves a checkpoint after the last step, before training ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == trainer.max_steps and not self.path.exists():
            trainer.save_checkpoint(self.path)
