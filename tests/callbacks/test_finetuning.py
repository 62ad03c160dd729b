"""Zeros are kept in training: with any optimizer, precision and compilation, beside other callbacks, in any LightningModule.

``ZeroWatch`` takes the reference masks from the weights when training starts. The code under test has no part in them.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from support.classes import tiny_model
from support.models import build_model
from support.training import MakeOptimizer, Module, OwnModule, ZeroWatch, linear_weights, prune_by_hand, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    LoraOptions,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    perplexity,
    verify_export,
)
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.callbacks.measuring import Measurer
from sparsellm_lightning.errors import MaskError
from sparsellm_lightning.sparsity import Masks


class OneByOne(torch.optim.Optimizer):
    """Updates parameters one after the other, by :meth:`update`."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group["lr"])
        return loss

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        raise NotImplementedError


class Mixing(OneByOne):
    """Adds the row's mean gradient and noise to every entry, so masked gradients and moments alone keep no zero."""

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        mean = gradient.mean(-1, keepdim=True).expand_as(p)
        p.add_(gradient + mean + 0.1 * torch.randn_like(p), alpha=-lr)


class EightBit(OneByOne):
    """Its momentum is kept as int8 codes and a scale, as in bitsandbytes and torchao. No mask can be multiplied into it."""

    def update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        codes, scale = self.state[p].get("codes", 0), self.state[p].get("scale", 0)
        momentum = gradient + 0.9 * scale * codes
        scale = momentum.abs().max() / 127 + 1e-12
        self.state[p].update(codes=(momentum / scale).round().to(torch.int8), scale=scale)
        p.sub_(momentum, alpha=10 * lr)


class Wrapping(torch.optim.Optimizer):
    """Around another optimizer, without torch's constructor, as public versions of Lookahead are. It moves pruned weights."""

    def __init__(self, parameters: Any) -> None:
        self.inner = Mixing(parameters)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, self.inner.defaults, self.inner.state

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(1e-3)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class WrappingWithHooks(Wrapping):
    """Has the attribute in which torch notes hooks, but its step does not call them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._optimizer_step_post_hooks: Any = OrderedDict()


def muon(parameters: Any) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.dim() == 2 and p.shape[0] < 512]  # not the embedding
    return torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, foreach=False, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3, weight_decay=0.1),
    "mixing": Mixing,
    "eight-bit": EightBit,
    "muon": muon,
    "wrapping": Wrapping,
    "wrapping-with-hooks": WrappingWithHooks,
}


@pytest.fixture
def loader(ids: Tensor) -> DataLoader[Any]:
    return DataLoader(ids, batch_size=4)


def pruner(**settings: Any) -> SparseLLMCallback:
    """A pruner with the fastest method, because these tests are about the zeros after pruning."""
    defaults = {
        "preset": "paper",
        "method": "magnitude",
        "sparsity": 0.7,
        "finetune": True,
        "num_calibration_samples": 16,
    }
    return SparseLLMCallback(**{**defaults, **settings})


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_watch_sees_lost_zeros(loader: DataLoader[Any]) -> None:
    """``ZeroWatch`` fails without the callback under test."""
    for make in (OPTIMIZERS["adamw"], Mixing):
        model = build_model("llama")
        prune_by_hand(model)
        with pytest.raises(AssertionError, match="look"):
            trainer(ZeroWatch(), max_steps=2).fit(Module(model, make), loader)


COMBINATIONS: list[tuple[str, dict[str, Any], bool]] = [
    ("adamw", {}, False),
    ("adamw-loop", {}, False),
    ("adafactor", {}, False),
    ("sgd", {"accumulate_grad_batches": 3}, False),
    ("mixing", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, False),
    ("muon", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, False),
    ("adamw-fused", {"precision": "bf16-mixed", "accumulate_grad_batches": 3}, False),
    ("adamw", {"precision": "bf16-true", "gradient_clip_val": 0.1}, False),
    ("mixing", {"precision": "bf16-true"}, False),
    ("eight-bit", {}, False),
    ("wrapping", {}, False),
    ("wrapping-with-hooks", {}, False),
    ("mixing", {"precision": "bf16-mixed"}, True),
]


@pytest.mark.parametrize(
    ("optimizer", "settings", "compiled"),
    COMBINATIONS,
    ids=["-".join([o, *map(str, s.values()), *(["compiled"] if c else [])]) for o, s, c in COMBINATIONS],
)
def test_zeros_hold_after_every_step(
    trained, loader: DataLoader[Any], optimizer: str, settings: dict[str, Any], compiled: bool
) -> None:
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = trained("llama")
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    # bfloat16 has 8 significant bits, so that small steps leave most weights as they are.
    make = OPTIMIZERS[optimizer]
    if settings.get("precision") == "bf16-true":
        make = scaled(make, 10)
    module = Module(model, make)
    first, last = ZeroWatch(), ZeroWatch()
    held = pruner(measure=False)
    fit = trainer(first, held, last, max_steps=4, **settings)
    fit.fit(module, loader)
    for watch in (first, last):
        assert watch.steps == 4
        # Two looks in every batch, one in every step, and one at the end of training.
        assert watch.looks == 4 * settings.get("accumulate_grad_batches", 1) * 2 + 4 + 1
        assert watch.sparsity() == pytest.approx(0.7, abs=0.002)
        assert watch.moved(module) > (0.3 if settings.get("precision") == "bf16-true" else 0.98)
    moments = last.moments(module, fit.optimizers[0])
    assert len(moments) >= (0 if optimizer in ("mixing", "adafactor", "wrapping", "wrapping-with-hooks") else 21)
    assert all(bool((pruned == 0).all()) and bool((kept != 0).any()) for pruned, kept in moments)
    assert held.report is not None
    assert held.report.mask_check == {"checks": 2, "layers": 21, "zeros": sum_of_zeros(last.start)}


def scaled(make: MakeOptimizer, factor: float) -> MakeOptimizer:
    """The optimizer with a higher learning rate."""

    def scaled_optimizer(parameters: Any) -> torch.optim.Optimizer:
        optimizer = make(parameters)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return optimizer

    return scaled_optimizer


def sum_of_zeros(weights: dict[str, Tensor]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights.values())


def test_a_scheduler_that_follows_a_metric(model_dir: Path, ids: Tensor) -> None:
    """It is stepped after every epoch."""
    module = CausalLM(
        str(model_dir), lr_scheduler=lambda o: ReduceLROnPlateau(o, "train_loss", patience=0, threshold=9.0)
    )
    rows = [{"input_ids": row} for row in ids[:8]]
    fit = trainer(pruner(measure=False), max_epochs=3)
    fit.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**3)


def test_zeros_hold_in_manual_optimization(trained, ids: Tensor) -> None:
    """The module itself steps two optimizers."""

    class Manual(OwnModule):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.backbone(batch, labels=batch).loss)
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            attention, others = [], []
            for name, p in self.named_parameters():
                (attention if "self_attn" in name else others).append(p)
            return [Mixing(attention), torch.optim.AdamW(others, lr=1e-3)]

    module = Manual(trained("llama"))
    prune_by_hand(module.backbone)
    watch = ZeroWatch()
    fit = trainer(watch, SparseFinetuning(), max_steps=6)
    fit.fit(module, DataLoader(ids, batch_size=4))
    assert fit.global_step == 6
    assert watch.moved(module) > 0.98
    moments = watch.moments(module, fit.optimizers[1])
    assert len(moments) == 18
    assert all(bool((pruned == 0).all()) for pruned, _ in moments)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_measures_kept_weights_only(trained, ids: Tensor, accumulate: int) -> None:
    model = trained("llama")
    prune_by_hand(model)
    norms: dict[str, float] = {}

    class Clipped(Module):
        def norm(self) -> float:
            return float(torch.stack([p.grad.double().square().sum() for p in self.parameters()]).sum().sqrt())

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norms["before"] = self.norm()

        def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
            norms["clipped over"] = self.norm()
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            norms["after"] = self.norm()

    reference = copy.deepcopy(model).train()
    for batch in ids[: 4 * accumulate].split(4):
        (reference(batch, labels=batch).loss / accumulate).backward()
    squares = {"kept": 0.0, "all": 0.0}
    pruned_layers = {id(weight) for weight in linear_weights(reference).values()}
    for p in reference.parameters():
        squares["all"] += float(p.grad.double().square().sum())
        if id(p) in pruned_layers:
            p.grad *= p.detach() != 0
        squares["kept"] += float(p.grad.double().square().sum())
    expected = squares["kept"] ** 0.5
    assert squares["all"] ** 0.5 > 1.05 * expected, "gradients of pruned weights are part of the whole norm"
    clip = 0.5 * expected

    module = Clipped(model, lambda p: torch.optim.SGD(p, lr=0.1))
    start = {name: p.detach().clone() for name, p in module.backbone.named_parameters()}
    settings = {"max_steps": 1, "gradient_clip_val": clip, "accumulate_grad_batches": accumulate}
    trainer(SparseFinetuning(), **settings).fit(module, DataLoader(ids, batch_size=4))
    assert norms["before"] == pytest.approx(expected, rel=1e-5)
    assert norms["clipped over"] == pytest.approx(expected, rel=1e-5)
    assert norms["after"] == pytest.approx(clip, rel=1e-5)
    for (name, p), q in zip(module.backbone.named_parameters(), reference.parameters(), strict=True):
        stepped = start[name] - 0.1 * q.grad * clip / (expected + 1e-6)
        assert torch.allclose(p.detach(), stepped, atol=1e-6), name


def test_a_kept_weight_that_an_optimizer_zeroes(trained, loader: DataLoader[Any]) -> None:
    class Zeroing(torch.optim.SGD):
        """Sets the first column of every matrix to zero."""

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    if p.dim() == 2:
                        p[:, 0] = 0
            return loss

    module = Module(trained("llama"), lambda p: Zeroing(p, lr=0.01))
    watch = ZeroWatch()
    trainer(watch, pruner(), max_steps=2).fit(module, loader)
    tiny = torch.finfo(torch.float32).tiny
    for name, weight in linear_weights(module).items():
        start = watch.start[name][:, 0]
        assert torch.equal(weight.detach()[:, 0], torch.where(start == 0, 0.0, tiny))
        assert 0 < int((start != 0).sum()) < len(start)


def test_zeros_that_an_optimizer_moves(trained, loader: DataLoader[Any]) -> None:
    """An optimizer that moves zeros leaves their number as it was."""

    class Rolling(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    if p.dim() == 2:
                        p.copy_(p.roll(1, -1))
            return loss

    watch = ZeroWatch()
    trainer(watch, pruner(measure=False), max_steps=2).fit(
        Module(trained("llama"), lambda p: Rolling(p, lr=1e-3)), loader
    )
    assert watch.steps == 2


# -- any sparse model -------------------------------------------------------------------------------------------------


class Regression(pl.LightningModule):
    """A small network without any module of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 12)
        self.network = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 8), nn.Linear(8, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.network(self.embedding(x)).squeeze(-1) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(("name", "pattern"), [("llama", "random"), ("gpt2", "2:4"), ("own", "random")])
def test_sparse_finetuning_alone(ids: Tensor, name: str, pattern: str) -> None:
    """The callback keeps the zeros of a model that something else pruned. GPT-2 stores its weights transposed."""
    if name == "own":
        module: pl.LightningModule = Regression()
        data = DataLoader([(torch.tensor(i % 16), torch.tensor(i % 3.0)) for i in range(64)], batch_size=8)
    else:
        module = Module(build_model(name), OPTIMIZERS["adamw"])
        data = DataLoader(ids, batch_size=4)
    prune_by_hand(module, pattern)
    first, held, last = ZeroWatch(), SparseFinetuning(), ZeroWatch()
    trainer(first, held, last, max_steps=4).fit(module, data)
    assert first.looks == last.looks == 4 * 3 + 1
    assert last.moved(module) > 0.9
    assert last.sparsity() == pytest.approx(0.6 if pattern == "random" else 0.5, abs=0.03)
    assert held.checks == 2, "at the end of the epoch and of the fit"
    if pattern == "2:4":
        for weight in linear_weights(module).values():
            stored = weight.T if name == "gpt2" else weight
            for row in stored.tolist()[:16]:
                for start in range(0, len(row), 4):
                    assert sum(value == 0 for value in row[start : start + 4]) == 2


def test_layers_that_are_dense_stay_free(ids: Tensor) -> None:
    """Layers with few zeros keep these, and train for the rest."""
    model = build_model("llama")
    sparse = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        sparse[:, ::2] = 0
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    module = Module(model, OPTIMIZERS["adamw"])
    trainer(SparseFinetuning(), max_steps=2).fit(module, DataLoader(ids, batch_size=4))
    assert bool((sparse[:, ::2] == 0).all())
    assert not bool((sparse[:, 1::2] == 0).any())
    moved = model.model.layers[0].mlp.up_proj.weight != before
    assert not bool(moved[0, 0])
    assert int(moved.sum()) > 0.9 * moved.numel()


def test_ignored_layers_that_were_pruned_before(trained, loader: DataLoader[Any]) -> None:
    model = trained("llama")
    attention = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    with torch.no_grad():
        for weight in attention:
            weight[:, ::2] = 0
    before = [weight.detach().clone() for weight in attention]
    callback = pruner(ignore=["*.self_attn.*"])
    trainer(callback, max_steps=2).fit(Module(model, Mixing), loader)
    assert callback.report.mask_check["layers"] == 12
    for now, weight in zip(attention, before, strict=True):
        assert torch.equal(now == 0, weight == 0)
        assert not torch.equal(now, weight)


@pytest.mark.parametrize(("limit", "steps"), [({"max_steps": 3}, 3), ({"max_epochs": 2}, 8)])
def test_schedulers_that_end_before_the_run(model_dir: Path, limit: dict[str, int], steps: int) -> None:
    """Torch would raise after all pruning and training."""
    module = CausalLM(
        str(model_dir),
        optimizer=lambda p: torch.optim.SGD(p, lr=8e-4),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=2),
    )
    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=16)
    with pytest.raises(UserError, match=rf"OneCycleLR plans total_steps 2, but the run steps it {steps} times"):
        trainer(pruner(), **limit).fit(module, data)


class Planned(torch.optim.lr_scheduler.LambdaLR):
    """A user's scheduler, which stays at its last value behind its plan."""

    total_steps = 1


@pytest.mark.parametrize(
    ("scheduler", "frequency"),
    [
        (lambda o: Planned(o, lambda step: 1.0), 1),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=2), 2),
    ],
    ids=["own", "every second step"],
)
def test_schedulers_that_outlast_the_run(loader: DataLoader[Any], scheduler: Any, frequency: int) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            config = {"scheduler": scheduler(optimizer), "interval": "step", "frequency": frequency}
            return {"optimizer": optimizer, "lr_scheduler": config}

    run = trainer(pruner(), max_steps=4)
    run.fit(Scheduled(build_model("llama"), OPTIMIZERS["adamw"]), loader)
    assert run.global_step == 4


def test_a_training_loader_that_can_be_read_once_is_refused(ids: Tensor) -> None:
    module = Module(build_model("llama"), OPTIMIZERS["adamw"])
    with pytest.raises(UserError, match="iterator, which can be read once"):
        trainer(pruner(), max_steps=2).fit(module, iter(ids.split(4)))
    with pytest.raises(UserError, match="Calibration and the baseline both read"):
        trainer(pruner(finetune=False, baseline=True)).fit(module, iter(ids.split(4)), DataLoader(ids[:4]))
    trainer(pruner(finetune=False)).fit(module, iter(ids.split(4)))


def test_a_trial_run_exports_nothing(ids: Tensor, tmp_path: Path) -> None:
    held = pruner(export_dir=str(tmp_path / "out"), schedule={0: 0.5, 5: 0.7}, sparsity=None)
    with pytest.warns(UserWarning, match="exports nothing"):
        trainer(held, fast_dev_run=True).fit(
            Module(build_model("llama"), OPTIMIZERS["adamw"]), DataLoader(ids, batch_size=4)
        )
    assert held.report is not None
    assert held.report.sparsity["achieved"] == pytest.approx(0.5, abs=0.002)
    assert not list(tmp_path.iterdir())


def test_folders_stay_where_they_were_asked_for(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Module):
        def on_fit_start(self) -> None:
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    module = Elsewhere(build_model("llama"), OPTIMIZERS["adamw"])
    trainer(pruner(finetune=False, export_dir="out", resume_dir="resume")).fit(module, DataLoader(ids, batch_size=4))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "resume" / "stage-0").is_dir()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_stage_that_fails_leaves_the_last_checkpoint(
    ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelCheckpoint would take the one that is not saved for saved, and link last.ckpt to it."""

    def stop(running: pl.Trainer, *block: Any) -> None:
        if running.global_step:  # in the second stage
            raise RuntimeError("the power went out")

    monkeypatch.setattr("sparsellm_lightning.callbacks.reports.log_block", stop)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last="link", save_on_exception=True)
    run = trainer(pruner(schedule={0: 0.5, 3: 0.7}, sparsity=None), saving, max_steps=6, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="power"):
        run.fit(Module(build_model("llama"), OPTIMIZERS["adamw"]), DataLoader(ids, batch_size=4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_frozen_layers_are_left_alone(ids: Tensor) -> None:
    model = build_model("llama")
    prune_by_hand(model)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    module = Module(model, lambda p: Mixing([q for q in p if q.requires_grad]))
    frozen = copy.deepcopy(model.model.layers[0].state_dict())
    watch = ZeroWatch()
    trainer(watch, SparseFinetuning(), max_steps=2).fit(module, DataLoader(ids, batch_size=4))
    assert all(torch.equal(value, frozen[key]) for key, value in model.model.layers[0].state_dict().items())
    assert watch.looks


def test_a_dense_model_is_refused(ids: Tensor) -> None:
    with pytest.raises(UserError, match=r"no linear layer of Module has 1 % of zeros.*SparseLLMCallback"):
        trainer(SparseFinetuning(), max_steps=1).fit(Module(build_model("llama"), Mixing), DataLoader(ids))


def test_lightnings_own_pruning_is_refused(ids: Tensor) -> None:
    for callbacks in (
        [SparseFinetuning(), ModelPruning("l1_unstructured", amount=0.5)],
        [ModelPruning("random_unstructured"), pruner()],
    ):
        model = build_model("llama")
        prune_by_hand(model)
        with pytest.raises(UserError, match=r"ModelPruning.*Remove one"):
            trainer(*callbacks, max_steps=1).fit(Module(model, Mixing), DataLoader(ids))


# -- beside other callbacks -------------------------------------------------------------------------------------------


class Validated(Module):
    """Logs its losses and has a learning-rate schedule, which the usual callbacks need."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.backbone(batch, labels=batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def stacked(kind: str, folder: Path) -> dict[str, pl.Callback]:
    average = EMAWeightAveraging(decay=0.5) if kind == "ema" else WeightAveraging()
    return {
        "held": SparseFinetuning(),
        "stopping": EarlyStopping("val_loss", patience=1),
        "checkpoint": ModelCheckpoint(folder, "{step}", monitor="val_loss", save_top_k=-1, save_last=True),
        "rates": LearningRateMonitor(),
        "average": average,
        "watch": ZeroWatch(),
    }


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("held stopping checkpoint rates average watch", "ema"),
        ("watch average rates checkpoint stopping held", "ema"),
        ("average held watch checkpoint stopping rates", "swa"),
    ],
)
def test_any_order_of_callbacks(tmp_path: Path, ids: Tensor, order: str, kind: str) -> None:
    model = build_model("llama")
    prune_by_hand(model)
    module = Validated(model, Mixing)
    callbacks = stacked(kind, tmp_path)
    fit = trainer(
        *(callbacks[name] for name in order.split()),
        max_epochs=2,
        limit_train_batches=3,
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path, name="", version="run"),
        log_every_n_steps=1,
    )
    data = DataLoader(ids, batch_size=4)
    fit.fit(module, data, DataLoader(ids[:8], batch_size=4))
    watch = callbacks["watch"]
    assert isinstance(watch, ZeroWatch)
    # Three looks in each of three batches and one in each of two validation batches, per epoch. One at the end.
    assert watch.looks == 2 * (3 * 3 + 2) + 1
    assert watch.moved(module) > 0.98
    watch.look(module)  # after the fit the module has the averaged weights
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        for state in ("state_dict", "current_model_state"):
            for name, start in watch.start.items():
                assert torch.equal(checkpoint[state][f"{name}.weight"] == 0, start == 0), (
                    f"{file.name}, {state}, {name}"
                )
    assert "lr-Mixing" in (tmp_path / "run" / "metrics.csv").read_text()


@pytest.mark.parametrize("first", ["pruner", "average"])
def test_stochastic_weight_averaging_is_exported(tmp_path: Path, trained, ids: Tensor, first: str) -> None:
    """The export holds the average of the epochs, not the last of them, and the report its perplexity."""
    last: dict[str, Tensor] = {}

    class Last(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            last.update({name: weight.detach().clone() for name, weight in linear_weights(pl_module).items()})

    held = pruner(export_dir=str(tmp_path / "out"))
    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    callbacks = [held, average] if first == "pruner" else [average, held]
    module = Module(trained("llama"), lambda p: torch.optim.SGD(p, lr=1e-2))
    data = DataLoader(ids, batch_size=4)
    trainer(*callbacks, Last(), max_epochs=4, limit_train_batches=4).fit(module, data, data)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = linear_weights(exported)
    for name, weight in linear_weights(module).items():
        name = name.removeprefix("backbone.")
        assert torch.equal(weights[name], weight), "the module holds the average when the fit has ended"
        assert not torch.equal(weights[name], last[f"backbone.{name}"])
        assert torch.equal(weights[name] == 0, last[f"backbone.{name}"] == 0)
    assert held.report is not None
    assert held.report.perplexity["finetuned"] == pytest.approx(perplexity(exported, data), rel=1e-5)


def test_stochastic_weight_averaging_of_nothing_is_refused(model_dir: Path, text) -> None:
    """Lightning's callback copies the module before CausalLM has a model."""
    average = StochasticWeightAveraging(swa_lrs=1e-2)
    with pytest.raises(UserError, match="average no weight of CausalLM"):
        trainer(pruner(), average, max_epochs=4).fit(CausalLM(str(model_dir)), text)


@pytest.mark.parametrize("own", [True, False])
def test_a_bf16_true_report_is_of_the_exported_file(tmp_path: Path, trained, model_dir: Path, text, own: bool) -> None:
    """Lightning would round the rotary frequencies, which a model loaded from the file computes in float32."""
    module = Module(trained("llama"), OPTIMIZERS["adamw"]) if own else CausalLM(str(model_dir))
    held = SparseLLMCallback(
        preset="paper", method="wanda", sparsity=0.5, num_calibration_samples=8, export_dir=str(tmp_path / "out")
    )
    trainer(held, precision="bf16-true").fit(module, text.train_dataloader(), text.val_dataloader())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16
    assert held.report is not None
    assert held.report.perplexity["pruned"] == perplexity(exported, text.val_dataloader())


def test_routers_stay_in_float32(tmp_path: Path, ids: Tensor) -> None:
    """transformers keeps them so in models that are loaded in bfloat16, and chooses experts by them."""
    model = tiny_model("glm4_moe")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = pruner(finetune=False, export_dir=str(tmp_path / "out"), measure=False, ignore=["*gate"])
    trainer(held, precision="bf16-true").fit(Module(model, OPTIMIZERS["adamw"]), DataLoader(ids % 16, batch_size=8))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    routers = [name for name in exported if name.endswith((".gate.weight", "e_score_correction_bias"))]
    assert len(routers) >= 2
    for name in routers:
        assert torch.equal(exported[name], state[name]), name
    assert exported["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_averages_that_start_late(trained, ids: Tensor) -> None:
    """The averaged copy is made at setup, from the dense model, and validation uses it before the first update."""
    model = trained("llama")
    module = Validated(model, OPTIMIZERS["adamw"])
    watch = ZeroWatch()
    average = EMAWeightAveraging(decay=0.5, update_starting_at_step=2)
    fit = trainer(pruner(measure=False), average, watch, max_steps=4, limit_val_batches=1, val_check_interval=1)
    fit.fit(module, DataLoader(ids, batch_size=4), DataLoader(ids[:4], batch_size=4))
    watch.look(module)


class Rogue(pl.Callback):
    """Sets one weight to a value that its mask forbids."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        weight = pl_module.backbone.model.layers[1].mlp.down_proj.weight.data.view(-1)
        index = int(((weight == 0) != (self.value == 0)).nonzero()[0])
        weight[index] = self.value


@pytest.mark.parametrize(
    ("value", "first"), [(0.5, True), (0.0, False)], ids=["a zero becomes 0.5", "a kept weight becomes zero"]
)
def test_a_rogue_callback_is_found(trained, loader: DataLoader[Any], value: float, first: bool) -> None:
    module = Module(trained("llama"), OPTIMIZERS["adamw"])
    watch = ZeroWatch()
    held = pruner(measure=False)
    callbacks = [Rogue(value), held] if first else [held, Rogue(value)]
    with pytest.raises(MaskError) as caught:
        trainer(*callbacks, watch_start := StartOnly(watch), max_epochs=2, limit_train_batches=1).fit(module, loader)
    assert watch_start.epochs == 1, "found at the end of the epoch in which it happened"
    name = "model.layers.1.mlp.down_proj"
    zeros, size = int((watch.start[f"backbone.{name}"] == 0).sum()), 64 * 128
    now = zeros + (1 if value == 0 else -1)
    message = str(caught.value)
    assert message.startswith(f"{name} must keep the {zeros} zeros ({100 * zeros / size:.4f} %)")
    assert f"has {now} ({100 * now / size:.4f} %), 1 of its weights" in message


class StartOnly(pl.Callback):
    """Gives a watch the weights at the first batch, without its later comparisons, and counts epochs."""

    def __init__(self, watch: ZeroWatch) -> None:
        self.watch, self.epochs = watch, 0

    def on_train_epoch_start(self, *args: Any) -> None:
        self.epochs += 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.watch.on_train_batch_start(trainer, pl_module)


# -- prune and fine-tune ----------------------------------------------------------------------------------------------


def test_report_of_a_finetuned_model(tmp_path: Path, trained, text, loader: DataLoader[Any]) -> None:
    module = Module(trained("llama"), lambda p: torch.optim.AdamW(p, lr=3e-4))
    held = pruner(export_dir=str(tmp_path / "out"))
    watch = ZeroWatch()
    trainer(held, watch, max_epochs=2, limit_train_batches=8).fit(module, loader, text.test_dataloader())
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert max(report["perplexity"]["dense"], report["perplexity"]["finetuned"]) < report["perplexity"]["pruned"]
    zeros = sum_of_zeros(watch.start)
    # One check at the end of each of two epochs, and one at the end of training.
    assert report["mask_check"] == {"checks": 3, "layers": 21, "zeros": zeros}
    assert report["stages"] == []
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum_of_zeros({n: w.detach() for n, w in linear_weights(exported).items()}) == zeros
    measured = perplexity(exported, text.test_dataloader())
    assert report["perplexity"]["finetuned"] == pytest.approx(measured, rel=1e-5)


def test_measured_where_the_model_was_trained(trained, text, loader: DataLoader[Any], monkeypatch) -> None:
    """Perplexity and masks are measured before Lightning moves the model to the CPU.

    On the CPU the measurement would be slow, and NCCL could not sum over ranks.
    """
    module = Module(trained("llama"), OPTIMIZERS["adamw"])
    away = {"now": False, "measured": []}
    cpu, to = nn.Module.cpu, nn.Module.to

    def to_cpu(self: nn.Module) -> nn.Module:
        away["now"] |= self is module
        return cpu(self)

    def to_device(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        away["now"] &= self is not module
        return to(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "cpu", to_cpu)
    monkeypatch.setattr(nn.Module, "to", to_device)
    check = Masks.check
    monkeypatch.setattr(Masks, "check", lambda masks: away["measured"].append(away["now"]) or check(masks))
    held = pruner()
    monkeypatch.setattr(Measurer, "perplexity", lambda *args: away["measured"].append(away["now"]))
    trainer(held, max_steps=1).fit(module, loader, text.test_dataloader())
    assert len(away["measured"]) == 5, "perplexity dense, pruned and fine-tuned, and two checks of the masks"
    assert not any(away["measured"])


def test_two_keepers_are_refused(trained, loader: DataLoader[Any]) -> None:
    for callbacks in ([pruner(), SparseFinetuning()], [SparseFinetuning(), pruner(finetune=False)]):
        with pytest.raises(UserError, match="another SparseFinetuning or SparseLLMCallback"):
            trainer(*callbacks, max_steps=1).fit(Module(trained("llama"), Mixing), loader)
    for twice in (SparseFinetuning, pruner):
        with pytest.raises(RuntimeError, match="more than one stateful callback"):  # a rule of Lightning
            trainer(twice(), twice())


class MaskRecorder(pl.Callback):
    """The zeros directly after every optimizer step, by step."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        now = {n: w.detach() == 0 for n, w in linear_weights(pl_module).items()}
        self.by_step.setdefault(trainer.global_step, now)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sparsellm", {"accumulate_grad_batches": 2}),
        ("wanda", {}),
        ("magnitude", {"precision": "bf16-true"}),
    ],
)
def test_gradual_pruning(trained, text, loader: DataLoader[Any], method: str, settings: dict[str, Any]) -> None:
    module = Module(trained("llama"), OPTIMIZERS["adamw"])
    recorder = MaskRecorder()
    held = pruner(sparsity=None, schedule={0: 0.5, 4: 0.6, 8: 0.7}, method=method, num_iterations=2)
    fit = trainer(
        recorder, held, max_steps=12, limit_train_batches=8 * settings.get("accumulate_grad_batches", 1), **settings
    )
    fit.fit(module, loader, text.test_dataloader())
    masks = recorder.by_step
    masks.pop(0, None)  # the batches before the first step, if gradients are accumulated
    assert list(masks) == list(range(1, 13))
    tolerance = 0.006 if method == "wanda" else 0.003  # wanda rounds the number of zeros in every row
    for step, mask in masks.items():
        stage = min((step - 1) // 4, 2)
        zeros, size = sum(int(m.sum()) for m in mask.values()), sum(m.numel() for m in mask.values())
        assert zeros / size == pytest.approx((0.5, 0.6, 0.7)[stage], abs=tolerance), f"step {step}"
        if step > 1:
            for name, m in mask.items():
                before = masks[step - 1][name]
                assert bool((m | ~before).all()), f"{name} lost zeros at step {step}"
                assert torch.equal(m, before) == (step not in (5, 9)), f"{name} changed at step {step}"
    report = held.report
    assert report is not None
    assert [stage["step"] for stage in report.stages] == [0, 4, 8]
    assert [stage["sparsity"] for stage in report.stages] == pytest.approx([0.5, 0.6, 0.7], abs=tolerance)
    assert all(stage["before"] < stage["after"] for stage in report.stages[:1])
    assert report.perplexity["dense"] == report.stages[0]["before"]
    assert report.perplexity["pruned"] == report.stages[-1]["after"]
    assert report.sparsity["achieved"] == pytest.approx(0.7, abs=tolerance)
    assert report.mask_check is not None
    assert report.mask_check["zeros"] == sum(int(m.sum()) for m in masks[12].values())
    watch = ZeroWatch()
    watch.start = {name: (~m).float() for name, m in masks[12].items()}
    moments = watch.moments(module, fit.optimizers[0])
    assert len(moments) == 42
    assert all(bool((pruned == 0).all()) for pruned, _ in moments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {2: 0.5}}, "begin at step 0"),
        ({"schedule": {}}, "begin at step 0"),
        ({"schedule": {0: 0.5, 4: 0.4}}, "rise"),
        ({"schedule": {0: 0.5, 4: 0.5}}, "rise"),
        ({"schedule": {0: 0.5, 4: 1.0}}, r"within \(0, 1\)"),
        ({"schedule": {0: 0.5, 4: 0.6}, "finetune": False}, "finetune is false"),
        ({"schedule": {0: 0.5, 4: 0.6}, "pattern": "2:4"}, "pattern unstructured"),
        ({"schedule": {0: 0.5, 4: 0.6}, "sparsity": 0.7}, "sparsity 0.7"),
    ],
)
def test_refused_schedules(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pruner(**{"sparsity": None, **settings})


def test_schedules_that_do_not_fit_the_run(trained, loader: DataLoader[Any], model_dir: Path, text) -> None:
    def gradual() -> SparseLLMCallback:
        return pruner(sparsity=None, schedule={0: 0.5, 4: 0.6})

    for steps in (4, 2):
        with pytest.raises(UserError, match=f"stage at step 4, but the run ends at max_steps {steps}"):
            trainer(gradual(), max_steps=steps).fit(Module(trained("llama"), Mixing), loader)
    with pytest.warns(
        UserWarning, match=r"ended at step 3, before the schedule's stages at 4\. Train longer"
    ) as warned:
        trainer(gradual(), max_epochs=1, limit_train_batches=3).fit(Module(trained("llama"), Mixing), loader)
    early = [
        str(w.message) for w in warned if "takes about 3 steps, so that the schedule's stages at 4" in str(w.message)
    ]
    assert len(early) == 1, "and before the work"
    trainer(gradual(), GradientAccumulationScheduler({0: 2, 1: 1}), max_epochs=2, limit_train_batches=4).fit(
        Module(trained("llama"), Mixing), loader
    )  # its number of steps is not known before
    for callbacks in ([gradual(), EMAWeightAveraging()], [WeightAveraging(), gradual()]):
        with pytest.raises(UserError, match="weight averaging"):
            trainer(*callbacks, max_steps=6).fit(Module(trained("llama"), Mixing), loader)
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="LoRA"):
        trainer(gradual(), max_steps=6).fit(CausalLM(str(model_dir), lora=LoraOptions(rank=2)), text)


# -- any task ---------------------------------------------------------------------------------------------------------


def test_a_classifier(trained, ids: Tensor) -> None:
    """A model with a classification head is pruned and trained. It has no perplexity."""
    base = trained("llama")
    config = copy.deepcopy(base.config)
    config.num_labels = 3
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(base.model.state_dict())
    labels = ids[:, 0] % 3

    class Classifier(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.backbone(**batch).loss

    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    module = Classifier(model, OPTIMIZERS["adamw"])
    head = model.score.weight.detach().clone()
    watch, held = ZeroWatch(), pruner()
    trainer(watch, held, max_steps=6).fit(module, DataLoader(data, batch_size=8), DataLoader(data[:8], batch_size=8))
    assert watch.looks == 6 * 3 + 1
    assert watch.moved(module) > 0.98
    assert watch.sparsity() == pytest.approx(0.7, abs=0.002)
    assert not torch.equal(model.score.weight, head)
    assert held.report is not None
    assert held.report.perplexity == {"dense": None, "pruned": None, "finetuned": None}
    assert held.report.mask_check is not None
    assert held.report.mask_check["zeros"] == sum_of_zeros(watch.start)
    _, _, dense, pruned, finetuned, *_ = (line.split() for line in held.report.table().splitlines())
    assert (dense[-1], pruned[-2], finetuned[-1]) == ("-", "-", "-"), "perplexities of a classifier"


def test_instruction_tuning(model_dir: Path, ids: Tensor) -> None:
    """Prompts are labelled -100 and answers are padded. Only the answers are learned and measured, and the zeros are kept."""
    prompt, answer = ids[:32, :20], torch.arange(5, 13).repeat(32, 1)
    rows = torch.cat([prompt, answer, torch.zeros(32, 4, dtype=torch.long)], 1)
    mask = torch.ones_like(rows)
    mask[:, 28:] = 0
    labels = rows.masked_fill(mask == 0, -100)
    labels[:, :20] = -100
    data = [{"input_ids": r, "attention_mask": m, "labels": y} for r, m, y in zip(rows, mask, labels, strict=True)]
    module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    watch, held = ZeroWatch(), pruner()
    validation = DataLoader(data[:8], batch_size=8)
    trainer(watch, held, max_steps=12).fit(module, DataLoader(data, batch_size=8), validation)
    assert watch.moved(module) > 0.98
    assert held.report is not None
    measured = held.report.perplexity
    assert measured["finetuned"] < 0.1 * measured["pruned"]
    # The perplexity of the answers' tokens alone, by hand.
    with torch.no_grad():
        logits = module.model.eval()(rows[:8], attention_mask=mask[:8]).logits[:, 19:27].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer[:8].flatten()).exp()
    assert measured["finetuned"] == pytest.approx(float(expected), rel=1e-4)
    assert (held.report.calibration["windows"], held.report.calibration["tokens"]) == (16, 16 * 28)


@pytest.mark.parametrize("name", ["llama", "gpt2"], ids=["own head", "tied head"])
@pytest.mark.parametrize("trains", [True, False])
def test_embeddings_that_stay_as_they_are(
    trained, text: TextDataModule, tmp_path: Path, name: str, trains: bool
) -> None:
    """Of the pruned model the embeddings and the head are the dense ones if they do not train. All else trains."""
    dense = trained(name)
    dense.save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path), optimizer=OPTIMIZERS["adamw"], train_embeddings=trains)
    watch = ZeroWatch()
    trainer(watch, pruner(measure=False), max_steps=2).fit(module, text)
    outside = {id(p) for m in (dense.get_input_embeddings(), dense.get_output_embeddings()) for p in m.parameters()}
    changed = {
        parameter: not torch.equal(module.model.get_parameter(n), parameter)
        for n, parameter in dense.named_parameters()
    }
    assert {changed[p] for p in changed if id(p) in outside} == {trains}
    assert all(changed[p] for p in changed if id(p) not in outside)
    assert watch.moved(module) > 0.98


def test_described_layers_are_the_watched_ones(trained) -> None:
    """``linear_weights`` of these tests names the layers that the package prunes."""
    for name in ("llama", "opt", "gpt2"):
        model = build_model(name)
        described = {p.name for p in describe(model).projections()}
        assert set(linear_weights(model)) == described


def test_few_zeros_and_a_sparse_head_are_kept(ids: Tensor) -> None:
    """Layers below 1 % of zeros, and a head of its own. A layer of zeros only trains, and a warning names it."""
    model = build_model("gpt_neox")
    prune_by_hand(model)
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    few, empty = (
        next(m for name, m in layers.items() if name.endswith(end))
        for end in ("1.mlp.dense_h_to_4h", "0.attention.dense")
    )
    with torch.no_grad():
        head.weight[:, ::3] = 0
        few.weight[few.weight == 0] = 0.01
        few.weight.view(-1)[:7] = 0
        empty.weight.zero_()
    before = {name: module.weight.detach() == 0 for name, module in layers.items()}
    with pytest.warns(UserWarning, match=r"zeros of .*0\.attention\.dense \(zeros only\) are not kept"):
        trainer(SparseFinetuning(), max_steps=3).fit(Module(model, OPTIMIZERS["adamw"]), DataLoader(ids, batch_size=4))
    for name, module in layers.items():
        if module is empty:
            assert bool((module.weight != 0).any()), "a layer of zeros only trains"
        else:
            assert torch.equal(module.weight == 0, before[name]), name


def test_a_sparse_tied_head_is_named(trained, ids: Tensor) -> None:
    model = trained("gpt2")
    prune_by_hand(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, ::2] = 0
    with pytest.warns(UserWarning, match=r"wte \(an embedding, and a head tied to it\) are not kept"):
        trainer(SparseFinetuning(), max_steps=1).fit(Module(model, OPTIMIZERS["adamw"]), DataLoader(ids, batch_size=4))


def test_zeros_that_are_not_kept_are_named(ids: Tensor) -> None:
    """A matrix that is no linear layer."""
    model = build_model("llama")
    prune_by_hand(model)
    module = OwnModule(model)
    module.attention = nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        module.attention.in_proj_weight[:, ::2] = 0
    with pytest.warns(UserWarning, match=r"The zeros of attention\.in_proj_weight are not kept in training"):
        trainer(SparseFinetuning(), max_steps=1).fit(module, DataLoader(ids, batch_size=4))


@pytest.mark.parametrize("pack", [True, False])
def test_a_model_without_a_head_is_not_packed(tmp_path: Path, ids: Tensor, pack: bool) -> None:
    model = LlamaForSequenceClassification(build_model("llama").config)
    pruner = SparseLLMCallback(
        preset="paper", method="magnitude", measure=False, pack=pack, export_dir=str(tmp_path / "out")
    )
    run = trainer(pruner, max_steps=1)
    if pack:
        with pytest.raises(UserError, match=r"but the model is a LlamaForSequenceClassification\. Set pack"):
            run.fit(OwnModule(model), DataLoader(ids, batch_size=4))
    else:
        run.fit(OwnModule(model), DataLoader(ids, batch_size=4))
        assert verify_export(tmp_path / "out", [ids]) == []
        written = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
        assert torch.equal(written.score.weight, model.score.weight)


class Late(OwnModule):
    """Builds its model after the callbacks are set up."""

    def __init__(self, make: Any) -> None:
        pl.LightningModule.__init__(self)
        self.batches_seen = 0
        self.make = make


class LateInConfigureModel(Late):
    def configure_model(self) -> None:
        if not hasattr(self, "backbone"):
            self.backbone = self.make()


class LateInSetup(Late):
    def setup(self, stage: str) -> None:
        self.backbone = self.make()


@pytest.mark.parametrize("kind", [LateInConfigureModel, LateInSetup])
def test_rotary_frequencies_of_a_model_that_is_built_late(tmp_path: Path, trained, text, kind: type[Late]) -> None:
    held = SparseLLMCallback(
        preset="paper", method="wanda", sparsity=0.5, num_calibration_samples=8, export_dir=str(tmp_path / "out")
    )
    run = trainer(held, precision="bf16-true")
    run.fit(kind(lambda: trained("llama")), text.train_dataloader(), text.val_dataloader())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert held.report is not None
    assert held.report.perplexity["pruned"] == perplexity(exported, text.val_dataloader())
    assert "convert_module" not in vars(run.precision_plugin)


def test_an_average_of_nothing_is_refused_before_pruning(trained, ids: Tensor) -> None:
    with pytest.raises(UserError, match="average no weight of LateInSetup"):
        trainer(pruner(measure=False), EMAWeightAveraging(), max_steps=1).fit(
            LateInSetup(lambda: trained("llama")), DataLoader(ids, batch_size=4)
        )


def test_a_checkpoint_that_is_only_evaluated_leaves_the_report(
    tmp_path: Path, trained, loader: DataLoader[Any]
) -> None:
    held, saver = pruner(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)
    run = trainer(held, saver, max_steps=2, enable_checkpointing=True)
    module = Module(trained("llama"), OPTIMIZERS["adamw"])
    run.fit(module, loader, loader)
    assert held.report is not None
    before = held.report.to_dict()
    assert before["perplexity"]["finetuned"]
    run.validate(module, loader, ckpt_path=saver.best_model_path, verbose=False)
    assert held.report.to_dict() == before


def test_zeros_of_an_evaluated_checkpoint_are_not_asked_of_the_next_model(
    tmp_path: Path, loader: DataLoader[Any]
) -> None:
    held, modules = SparseFinetuning(), []
    for pattern in ("random", "2:4"):
        model = build_model("llama")
        prune_by_hand(model, pattern)
        modules.append(Module(model, OPTIMIZERS["adamw"]))
    run = trainer(held, max_steps=1)
    run.fit(modules[0], loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.validate(modules[0], loader, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    trainer(held, max_steps=1).fit(modules[1], loader)


def test_a_callback_forgets_the_model_of_an_earlier_fit(loader: DataLoader[Any]) -> None:
    held, module = pruner(measure=False), Module(build_model("llama"), OPTIMIZERS["adamw"])
    trainer(held, max_steps=1).fit(module, loader)
    for weight in linear_weights(module).values():
        weight.data.fill_(1.0)
    held.finetune = False
    trainer(held).fit(Module(build_model("opt"), OPTIMIZERS["adamw"]), loader)
    assert held.checks == 0


class LeavesOut(Module):
    """Its state leaves out what is frozen."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "embed" not in key}


def test_averages_of_a_module_with_a_state_of_its_own(loader: DataLoader[Any]) -> None:
    module, watch = LeavesOut(build_model("llama"), OPTIMIZERS["adamw"]), ZeroWatch()
    trainer(pruner(measure=False), watch, EMAWeightAveraging(), max_steps=2).fit(module, loader)
    assert watch.sparsity() == pytest.approx(0.7, abs=0.01)


def test_stochastic_weight_averaging_that_never_starts(tmp_path: Path, loader: DataLoader[Any]) -> None:
    """Without max_epochs Lightning copies its average at the end in any case: it must not be the dense model."""
    out = tmp_path / "out"
    held = SparseLLMCallback(preset="paper", method="magnitude", sparsity=0.7, export_dir=str(out), measure=False)
    run = trainer(held, StochasticWeightAveraging(1e-3, swa_epoch_start=3), max_steps=100)
    run.fit(Module(build_model("llama"), OPTIMIZERS["adamw"]), loader)
    weights = linear_weights(AutoModelForCausalLM.from_pretrained(out)).values()
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.7, abs=0.01)


class Tunable(OwnModule):
    lr = 1e-4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def test_a_learning_rate_finder_is_no_resumed_run(tmp_path: Path, trained, loader: DataLoader[Any]) -> None:
    """It saves and loads the state of the callbacks, here with the report of the model before."""
    held = pruner(measure=False)
    trainer(held, max_steps=1).fit(Module(trained("llama"), OPTIMIZERS["adamw"]), loader)
    finder = LearningRateFinder(num_training_steps=4)
    module = Tunable(trained("llama"))
    trainer(finder, held, Distillation(), max_steps=1, default_root_dir=tmp_path).fit(module, loader)
    zeros = sum(int((w == 0).sum()) for w in linear_weights(module).values())
    assert zeros / sum(w.numel() for w in linear_weights(module).values()) == pytest.approx(0.7, abs=0.01)


def test_a_second_fit_that_trains_nothing_is_an_error(trained, loader: DataLoader[Any]) -> None:
    held = pruner(measure=False)
    run = trainer(held, max_steps=1)
    run.fit(Module(trained("llama"), OPTIMIZERS["adamw"]), loader)
    with pytest.raises(UserError, match="nothing has run"):
        run.fit(Module(trained("opt"), OPTIMIZERS["adamw"]), loader)
    assert held.report is None


def test_a_model_is_validated_before_it_is_trained(model_dir: Path) -> None:
    module, data = CausalLM(str(model_dir)), TextDataModule(sequence_length=32, batch_size=4, max_eval_windows=8)
    (before,) = trainer().validate(module, data, verbose=False)
    trainer(max_steps=1).fit(module, data)
    assert before["val_perplexity"] > 1


class Rates(pl.Callback):
    """The learning rate at the start of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [8.0, 4.0, 2.0, 1.0]), (2, [8.0, 8.0, 4.0, 4.0])])
def test_the_scheduler_goes_with_optimizer_steps(model_dir: Path, accumulate: int, expected: list[float]) -> None:
    rates, data = Rates(), TextDataModule(sequence_length=32, batch_size=4, max_train_windows=16)
    module = CausalLM(
        str(model_dir),
        optimizer=lambda p: torch.optim.SGD(p, lr=8e-4),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    )
    steps = {"max_steps": 4 // accumulate, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    trainer(rates, **steps).fit(module, data)  # type: ignore[arg-type]
    assert rates.seen == pytest.approx([1e-4 * rate for rate in expected])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_validation_of_a_rounded_model(model_dir: Path, precision: Any) -> None:
    """Its sums stay in float32: in 16 bits they would stop growing after some windows, or overflow."""
    module = CausalLM(str(model_dir))
    data = TextDataModule(sequence_length=64, batch_size=8, max_eval_windows=100)
    (measured,) = trainer(precision=precision).validate(module, data, verbose=False)
    assert module.perplexity.total_log_probs.dtype == torch.float32
    assert measured["val_perplexity"] == pytest.approx(perplexity(module.model, data.val_dataloader()), rel=2e-3)


class Flipping(torch.optim.SGD):
    """Changes every sign, so that the mean of two steps is 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.neg_()
        return loss


@pytest.mark.parametrize("first", [True, False])
def test_kept_weights_whose_average_is_zero(ids: Tensor, first: bool) -> None:
    """As it happens in 16 bits: they are not taken for pruned ones that something has filled or emptied.

    Also if the averages are copied into the model once more, after the check.
    """
    model = build_model("llama")
    prune_by_hand(model)
    expected = {name: weight.detach() == 0 for name, weight in linear_weights(model).items()}
    callbacks: list[pl.Callback] = [WeightAveraging(), SparseFinetuning()]
    module = Module(model, lambda parameters: Flipping(parameters, lr=0.0))
    trainer(*callbacks[:: 1 if first else -1], max_steps=2).fit(module, DataLoader(ids, batch_size=4))
    assert all(torch.equal(weight == 0, expected[name]) for name, weight in linear_weights(model).items())


def test_untrained_rows_of_a_head_train(ids: Tensor) -> None:
    model = build_model("gpt_neox")
    prune_by_hand(model)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[5:8] = 0
    with pytest.warns(UserWarning, match=r"lm_head \(rows of zeros\)"):
        trainer(SparseFinetuning(), max_steps=2).fit(Module(model, OPTIMIZERS["adamw"]), DataLoader(ids, batch_size=4))
    assert bool(head[5:8].any(1).all())


def test_zeros_of_a_head_of_sparse_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_model("gpt_neox")
    prune_by_hand(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[:, ::3] = 0
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    module = CausalLM(weights=str(tmp_path / "in"), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=16, max_eval_windows=4)
    trainer(SparseLLMCallback(measure=False), max_steps=2).fit(module, data)
    assert not bool(module.model.get_output_embeddings().weight[:, ::3].any())
