"""A dense teacher in the loss: against naive sums, by hand for one batch, and by its effect on a pruned model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.models import CONFIGS, build_model
from support.training import Module, OwnModule, ZeroWatch, prune_by_hand, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    perplexity,
    prune_model,
)
from sparsellm_lightning.callbacks.distillation import feature_loss, logit_loss


def pruner(sparsity: float = 0.7) -> SparseLLMCallback:
    return SparseLLMCallback(
        preset="paper", method="wanda", sparsity=sparsity, finetune=True, num_calibration_samples=16
    )


def naive_logit_loss(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None) -> float:
    """The divergence token by token and class by class, in double precision."""
    rows = zip(student.double().flatten(0, -2), teacher.double().flatten(0, -2), strict=True)
    counted = [True] * math.prod(student.shape[:-1]) if valid is None else valid.flatten().tolist()
    total = 0.0
    for (s, t), counts in zip(rows, counted, strict=True):
        if counts:
            p, q = ([math.exp(v / temperature) for v in row.tolist()] for row in (t, s))
            total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / sum(counted)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_logit_loss(temperature: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]]) if masked else torch.ones(2, 3, dtype=torch.bool)
    expected = naive_logit_loss(student, teacher, temperature, valid)
    loss = logit_loss(student, teacher, temperature, valid if masked else None)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(logit_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_logit_loss_of_padding_alone() -> None:
    student, teacher = torch.ones(1, 3, 5, requires_grad=True), torch.zeros(1, 3, 5)
    loss = logit_loss(student, teacher, valid=torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss) == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("valid", [None, torch.rand(3, 90, generator=torch.Generator().manual_seed(3)) < 0.7])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_logit_loss(valid: Tensor | None, reuse: bool, dtype: torch.dtype) -> None:
    """More tokens than one chunk of the computation, against autograd through the plain formula."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 90, 7, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 90, 7, generator=generator).to(dtype)  # another dtype's memory cannot hold the gradient
    given = teacher.clone()
    (0.7 * logit_loss(student, given, 2.0, valid, reuse=reuse)).backward()
    assert reuse or torch.equal(given, teacher)
    (ours,), student.grad = (student.grad.clone(),), None  # type: ignore[union-attr]
    s, t = (student, teacher.float()) if valid is None else (student[valid], teacher[valid].float())
    q, p = torch.log_softmax(s / 2, -1), torch.log_softmax(t / 2, -1)
    (0.7 * 4 * (p.exp() * (p - q)).sum(-1).mean()).backward()
    torch.testing.assert_close(ours, student.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_feature_loss(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 4, generator=generator) for _ in range(3)] for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        above = below = 0.0
        for b in range(2):
            for i in range(3):
                if valid[b, i] or not masked:
                    above += float((s[b, i].double() - t[b, i].double()).square().sum())
                    below += float(t[b, i].double().square().sum())
        expected += above / below / 3
    loss = feature_loss(student, teacher, valid if masked else None)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


class OneStep(OwnModule):
    """Remembers the loss that is trained."""

    loss: Tensor

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None: ...

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.loss = loss.detach()
        super().backward(loss, *args, **kwargs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        output = self.backbone(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        return {"loss": output.loss}


def test_the_loss_by_hand(trained, ids: Tensor) -> None:
    """All three terms on padded windows, against plain transformers with all hidden states."""
    student, teacher = trained("llama"), trained("llama")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    mask = torch.ones_like(ids[:4])
    mask[1, 40:] = mask[2, 10:] = 0
    batch = {"input_ids": ids[:4], "attention_mask": mask, "labels": ids[:4].masked_fill(mask == 0, -100)}
    valid = mask.bool()
    seen = []
    with torch.no_grad():
        for model in (student, teacher):
            states: list[Tensor] = []
            handles = [
                layer.register_forward_hook(lambda _m, _a, out, states=states: states.append(out))
                for layer in model.model.layers
            ]
            output = model(**batch)
            for handle in handles:
                handle.remove()
            seen.append((output, states))
    (ours, our_states), (theirs, their_states) = seen
    q, p = (torch.log_softmax(x.logits.double()[valid] / 2, -1) for x in (ours, theirs))
    kl = 4 * (p.exp() * (p - q)).sum(-1).mean()
    head = sum(
        (s[valid].double() - t[valid].double()).square().sum() / t[valid].double().square().sum()
        for s, t in zip(our_states, their_states, strict=True)
    ) / len(our_states)
    expected = 0.3 * float(ours.loss) + 0.5 * float(kl) + 2.0 * float(head)

    module = OneStep(student)
    distillation = Distillation(teacher, temperature=2.0, task_weight=0.3, logit_weight=0.5, feature_weight=2.0)
    loader = DataLoader([{key: value[i] for key, value in batch.items()} for i in range(4)], batch_size=4)
    trainer(distillation, max_steps=1).fit(module, loader)
    assert float(module.loss) == pytest.approx(expected, rel=1e-4)
    assert "training_step" not in vars(module), "training_step of the module is restored"
    assert all(p.grad is None for p in teacher.parameters()), "the teacher gets no gradients"


def test_distilled_ends_lower(trained, text: TextDataModule) -> None:
    """A model pruned to 80 % ends better with its teacher than without, with the same steps, optimizer and windows."""

    class Tokens(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.backbone(**batch).loss

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=3e-4)

    start = Tokens(trained("llama"), optimizer)
    once = SparseLLMCallback(preset="paper", method="sparsegpt", sparsity=0.8, num_calibration_samples=64)
    trainer(once, limit_val_batches=0).fit(start, text.train_dataloader())
    pruned = perplexity(start.backbone, text.test_dataloader())
    for seed in (0, 1):  # of the order of windows
        ends = {}
        for name, more in {"alone": [], "taught": [Distillation(trained("llama"))]}.items():
            module = Tokens(copy.deepcopy(start.backbone), optimizer)
            data = TextDataModule(sequence_length=64, batch_size=16, tokenizer=text.tokenizer, seed=seed)
            fit = trainer(SparseFinetuning(), *more, max_steps=30, limit_val_batches=0)
            fit.fit(module, data.train_dataloader())
            ends[name] = perplexity(module.backbone, text.test_dataloader())
        assert ends["taught"] < ends["alone"] < pruned


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_frozen_copy_is_of_the_dense_model(trained, ids: Tensor, order: int) -> None:
    dense = trained("opt")
    distillation = Distillation()
    taught: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            assert distillation._model is not None
            assert not distillation._model.training, "the teacher has no dropout"
            taught.append(copy.deepcopy(distillation._model.state_dict()))

    module = OwnModule(copy.deepcopy(dense))
    trainer(*[pruner(), distillation, Watch()][::order], max_steps=2).fit(module, DataLoader(ids, batch_size=8))
    for state in taught:
        assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert distillation._model is None, "the teacher's memory is freed"


def test_a_teacher_in_a_run_that_does_not_train_is_refused(ids: Tensor) -> None:
    run = trainer(SparseLLMCallback(preset="paper", sparsity=0.5), Distillation(build_model("llama")))
    with pytest.raises(UserError, match="Distillation teaches in training, but finetune=False"):
        run.fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8))


@pytest.mark.parametrize("order", [1, -1])
def test_the_teacher_comes_to_the_device_behind_pruning(
    ids: Tensor, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which needs the room."""
    seen: list[str] = []
    teacher = build_model("llama", seed=1)
    move = teacher.to

    def to(*args: Any, **kwargs: Any) -> PreTrainedModel:
        seen.append("teacher")
        return move(*args, **kwargs)

    def prune(*args: Any, **kwargs: Any) -> Any:
        seen.append("pruning")
        return prune_model(*args, **kwargs)

    monkeypatch.setattr(teacher, "to", to)
    monkeypatch.setattr("sparsellm_lightning.callbacks.reports.prune_model", prune)
    run = trainer(*[pruner(), Distillation(teacher)][::order], max_steps=1)
    run.fit(OwnModule(build_model("llama")), DataLoader(ids, batch_size=8))
    assert seen == ["pruning", "teacher"]


@pytest.mark.slow
def test_memory_savers(model_dir: Path) -> None:
    """The loss with a bfloat16 teacher is close to that with a float32 one. Offloading changes nothing."""
    losses = []
    for settings in ({}, {"teacher_dtype": "bfloat16"}, {"offload": True}):
        pl.seed_everything(0, verbose=False)
        module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        data = TextDataModule(sequence_length=32, batch_size=4, max_train_windows=4)
        fit = trainer(pruner(), Distillation(**settings), max_steps=1, limit_val_batches=0)
        fit.fit(module, data)
        losses.append(float(fit.callback_metrics["distillation_logit_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_weight": 0.0}, "above 0"),
        ({"task_weight": -0.1}, "at least 0"),
        ({"logit_weight": -0.1}, "at least 0"),
        ({"feature_weight": -1.0}, "at least 0"),
        ({"logit_weight": float("nan")}, "at least 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(**settings)


def test_no_dense_teacher(tmp_path: Path, trained, ids: Tensor) -> None:
    loader = DataLoader(ids, batch_size=8)
    module = OwnModule(trained("llama"))
    run = trainer(pruner(), Distillation(), max_steps=1)
    run.fit(module, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"already sparse.*path or hub id"):
        trainer(SparseFinetuning(), Distillation(), max_steps=2).fit(OwnModule(module.backbone), loader)
    again = OwnModule(trained("llama"))
    with pytest.raises(UserError, match="resumes a run"):
        trainer(pruner(), Distillation(), max_steps=2).fit(again, loader, ckpt_path=tmp_path / "a.ckpt")
    trained("llama").save_pretrained(tmp_path / "dense")
    resumed = trainer(pruner(), Distillation(str(tmp_path / "dense")), max_steps=2)
    resumed.fit(OwnModule(trained("llama")), loader, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.global_step == 2


def test_two_teachers_are_refused(trained, ids: Tensor) -> None:
    teachers = [Distillation(trained("llama")) for _ in range(2)]
    with pytest.raises(UserError, match="several Distillation callbacks"):
        trainer(pruner(), *teachers, max_steps=1).fit(OwnModule(trained("llama")), DataLoader(ids, batch_size=8))


# -- kinds of steps, teachers and students ----------------------------------------------------------------------------


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.fixture
def sparse(trained) -> PreTrainedModel:
    model = trained("llama")
    prune_by_hand(model)
    return model


class Losses(pl.Callback):
    """The loss of every batch, and a copy of the student at the first one."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.student: PreTrainedModel | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.student is None:
            model = pl_module.model if isinstance(pl_module, CausalLM) else pl_module.backbone
            self.student = copy.deepcopy(model)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def test_losses_of_bfloat16_are_taken_in_float32() -> None:
    student, teacher = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    measured = logit_loss(student, teacher, 2.0)
    assert measured.dtype == torch.float32
    assert float(measured) == pytest.approx(naive_logit_loss(student, teacher, 2.0, None), rel=1e-5)


class Dict(Module):
    """``training_step`` takes the batch only and returns a dictionary, and None for every third batch."""

    def training_step(self, batch: Tensor) -> Any:  # type: ignore[override]
        self.batches_seen += 1
        if self.batches_seen % 3 == 0:
            return None
        return {"loss": self.backbone(batch, labels=batch).loss, "more": torch.tensor(self.batches_seen)}


class Twice(Module):
    """Two forwards in one step, as contrastive losses have."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        halves = batch.chunk(2)
        return self.backbone(halves[0], labels=halves[0]).loss + self.backbone(input_ids=halves[1]).logits.mean()


class Sampling(Module):
    """Writes a sample in every step, as for a log, and takes a reference loss without gradients."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.backbone.generate(batch[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            self.backbone(batch.flip(1), labels=batch)
        return self.backbone(batch, labels=batch).loss


def loss_of(
    module: pl.LightningModule, ids: Tensor, *callbacks: pl.Callback, steps: int = 1, **settings: Any
) -> Losses:
    losses = Losses()
    trainer(*callbacks, losses, max_steps=steps, **settings).fit(module, DataLoader(ids, batch_size=4))
    return losses


def test_steps_of_other_shapes(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    """Steps without batch index that return a dictionary or None. A step with two forwards, both of which are compared."""
    dense = trained("llama")
    outputs: list[Any] = []

    class Outputs(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, output: Any, *args: Any) -> None:
            outputs.append(output)

    module = Dict(copy.deepcopy(sparse), adamw)
    fit = trainer(SparseFinetuning(), Distillation(dense), Outputs(), max_epochs=1, limit_train_batches=4)
    fit.fit(module, DataLoader(ids, batch_size=4))
    assert module.batches_seen == 4
    assert [None if not o else int(o["more"]) for o in outputs] == [1, 2, None, 4]

    measured = loss_of(
        Twice(copy.deepcopy(sparse), adamw), ids, SparseFinetuning(), Distillation(dense, task_weight=0.0)
    )
    expected = 0.0
    with torch.no_grad():
        for half in ids[:4].chunk(2):
            expected += 0.5 * naive_logit_loss(sparse(half).logits, dense(half).logits, 1.0, None)
    assert measured.losses == [pytest.approx(expected, rel=1e-4)]


def test_forwards_without_gradients_do_not_count(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    kinds = (Module, Sampling)
    plain, sampling = (
        loss_of(kind(copy.deepcopy(sparse), adamw), ids, SparseFinetuning(), Distillation(trained("llama"))).losses
        for kind in kinds
    )
    assert plain == sampling


@pytest.mark.parametrize("compiled", [False, True])
def test_features_of_compiled_or_checkpointed_blocks(trained, ids: Tensor, compiled: bool) -> None:
    """The callback sees the outputs of compiled blocks, and of blocks that the backward pass computes again."""
    weights = {"feature_weight": 1.0, "logit_weight": 0.0, "task_weight": 0.0}
    expected = loss_of(Module(trained("llama"), adamw), ids, pruner(), Distillation(**weights), steps=3).losses
    model = trained("llama")
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        model.gradient_checkpointing_enable()
    measured = loss_of(Module(model, adamw), ids, pruner(), Distillation(**weights), steps=3).losses
    assert measured == pytest.approx(expected, rel=1e-4)
    assert len(set(measured)) == 3


def test_every_kind_of_teacher(trained, model_dir: Path, ids: Tensor) -> None:
    """A name, a path, a model, the module's ``pretrained`` and a copy of the run's first model are the same dense teacher."""
    given = trained("llama")
    before = copy.deepcopy(given.state_dict())
    losses = {}
    for kind, teacher in {"name": str(model_dir), "path": model_dir, "model": given, "copy": None}.items():
        for first in (True, False):
            held, taught = pruner(), Distillation(teacher, task_weight=0.0)
            callbacks = [taught, held] if first else [held, taught]
            losses[kind, first] = loss_of(Module(trained("llama"), adamw), ids, *callbacks, steps=2).losses
    dense = [{"input_ids": row} for row in ids]
    losses["pretrained", True] = loss_of(
        CausalLM(str(model_dir), optimizer=adamw), dense, pruner(), Distillation(task_weight=0.0), steps=2
    ).losses
    expected = losses["model", True]
    assert expected[0] > 0.01, "the sparse student differs from the dense teacher"
    for key, found in losses.items():
        assert found == pytest.approx(expected, rel=1e-5), key
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items()), (
        "the teacher is not trained"
    )
    assert all(p.grad is None for p in given.parameters())


def test_offloaded_teacher(trained, sparse: PreTrainedModel, ids: Tensor, monkeypatch) -> None:
    """Each part of the teacher moves to the device and back for every batch. The loss is the same."""
    plain = loss_of(
        Module(copy.deepcopy(sparse), adamw), ids, SparseFinetuning(), Distillation(trained("llama")), steps=2
    )
    teacher = trained("llama")
    moves: list[tuple[nn.Module, str]] = []
    to = nn.Module.to

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        moves.append((self, str(args[0] if args else kwargs)))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", noted)
    module = Module(copy.deepcopy(sparse), adamw)
    offloaded = loss_of(module, ids, SparseFinetuning(), Distillation(teacher, offload=True), steps=2)
    assert offloaded.losses == plain.losses
    parts = [*teacher.model.layers, teacher.model.embed_tokens, teacher.model.norm, teacher.lm_head]
    for part in parts:
        # One move to the host at the start. Two moves in each of two steps.
        assert len([1 for moved, _ in moves if moved is part]) == 1 + 2 * 2, type(part).__name__
    assert teacher not in [moved for moved, _ in moves], "the teacher never moves as a whole"


def test_offloading_leaves_a_given_teacher_as_it_was(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    """Hooks would move a model in another use, and a model without gradients would not train."""
    teacher = trained("llama").train()
    teacher.model.norm.eval()
    teacher.lm_head.weight.requires_grad_(False)
    modes, frozen = ([m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()])
    taught = Distillation(teacher, offload=True)
    loss_of(Module(sparse, adamw), ids, SparseFinetuning(), taught)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == frozen
    assert taught._model is None


def test_the_logged_loss_is_of_all_forwards_of_a_step(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    logged = []
    for kind in (Module, Twice):
        module = kind(copy.deepcopy(sparse), adamw)
        run = trainer(SparseFinetuning(), Distillation(trained("llama"), task_weight=0.0), max_steps=1)
        run.fit(module, DataLoader(ids[:4], batch_size=4))
        logged.append(float(run.callback_metrics["distillation_logit_loss"]))
    assert logged[1] > 1.5 * logged[0] > 0


def test_one_of_several_models_is_the_student(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    class Two(Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__(model, adamw)
            self.other = build_model("gpt2")

    with pytest.raises(UserError, match=r"found backbone, other.*model_attribute"):
        loss_of(Two(copy.deepcopy(sparse)), ids, Distillation(trained("llama")))
    chosen = loss_of(Two(copy.deepcopy(sparse)), ids, Distillation(trained("llama"), model_attribute="backbone"))
    alone = loss_of(Module(copy.deepcopy(sparse), adamw), ids, Distillation(trained("llama")))
    assert chosen.losses == alone.losses


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(trained, model_dir: Path, ids: Tensor, precision: str) -> None:
    def losses(*callbacks: Any, precision: str) -> list[float]:
        module = Module(trained("llama"), lambda p: torch.optim.AdamW(p, lr=1e-2))
        taught = Distillation(str(model_dir), task_weight=0, feature_weight=0.1)
        return loss_of(module, ids, pruner(), taught, *callbacks, steps=4, precision=precision).losses

    watch = ZeroWatch()
    rounded, exact = losses(watch, precision=precision), losses(precision="32-true")
    assert watch.looks == 4 * 3 + 1
    assert exact[0] > 0.01
    assert rounded[0] == pytest.approx(exact[0], rel=0.1)
    assert all(math.isfinite(loss) for loss in rounded)


def test_teachers_that_do_not_fit(model_dir: Path, sparse: PreTrainedModel, ids: Tensor) -> None:
    loader = DataLoader(ids, batch_size=4)
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 600
    with pytest.raises(
        UserError, match="logit_weight needs a teacher with the student's vocab_size, 512, but it has 600"
    ):
        trainer(SparseFinetuning(), Distillation(LlamaForCausalLM(config)), max_steps=1).fit(
            Module(sparse, adamw), loader
        )

    classifier = LlamaForSequenceClassification(copy.deepcopy(CONFIGS["llama"]))
    prune_by_hand(classifier)

    class Classifier(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.backbone(input_ids=batch, labels=batch[:, 0] % 2).loss

    with pytest.raises(UserError, match=r"shapes \(4, 2\) and \(4, 64, 512\)"):
        trainer(SparseFinetuning(), Distillation(str(model_dir)), max_steps=1).fit(
            Classifier(classifier, adamw), loader
        )

    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 2
    taught = Distillation(LlamaForCausalLM(config), feature_weight=1.0)
    with pytest.raises(UserError, match="feature_weight needs a teacher with the student's num_hidden_layers, 3"):
        trainer(SparseFinetuning(), taught, max_steps=1).fit(Module(sparse, adamw), loader)


def test_the_student_itself_as_teacher(trained, ids: Tensor) -> None:
    """Its dense weights teach it, as without a teacher. It is not frozen."""
    model = trained("llama")
    module = Module(model, adamw)
    given = loss_of(module, ids, pruner(), Distillation(model))
    usual = loss_of(Module(trained("llama"), adamw), ids, pruner(), Distillation())
    assert given.losses == usual.losses
    assert all(p.requires_grad for p in model.parameters())


def test_a_classifier_learns_from_a_copy_of_itself(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(copy.deepcopy(CONFIGS["llama"]))
    model.model.load_state_dict(build_model("llama").model.state_dict())
    dense = copy.deepcopy(model)

    class Classifier(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.backbone(input_ids=batch, labels=batch[:, 0] % 2).loss

    losses = loss_of(Classifier(model, adamw), ids, pruner(), Distillation(task_weight=0.0, logit_weight=1.0))
    assert losses.student is not None
    with torch.no_grad():
        expected = naive_logit_loss(losses.student(ids[:4]).logits, dense(ids[:4]).logits, 1.0, None)
    assert losses.losses == [pytest.approx(expected, rel=1e-3)]


def test_a_step_without_a_forward_of_the_model(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    class Parts(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.backbone.lm_head(self.backbone.model(batch).last_hidden_state).mean()

    with pytest.raises(UserError, match="made none with gradients through the model's own forward"):
        loss_of(Parts(sparse, adamw), ids, SparseFinetuning(), Distillation(trained("llama")))


def test_a_step_that_takes_a_tuple(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    class Tuples(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.backbone(batch, labels=batch, return_dict=False)[0]

    with pytest.raises(UserError, match="return_dict false"):
        loss_of(Tuples(sparse, adamw), ids, SparseFinetuning(), Distillation(trained("llama")))


def test_the_training_step_is_restored(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    """After an error too, and a step that the user had set on the instance."""

    class Failing(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop here")

    taught = Distillation(trained("llama"))
    module = Module(copy.deepcopy(sparse), adamw)
    loss_of(module, ids, SparseFinetuning(), taught)
    assert "training_step" not in vars(module)
    assert taught._model is None, "the teacher's memory is free"
    with pytest.raises(RuntimeError, match="stop here"):
        loss_of(module, ids, SparseFinetuning(), taught, Failing())
    assert "training_step" not in vars(module)
    # The callback works in another run.
    assert loss_of(module, ids, SparseFinetuning(), taught).losses

    own = Module(copy.deepcopy(sparse), adamw)
    replaced = lambda batch, batch_idx: 2 * OwnModule.training_step(own, batch, batch_idx)  # noqa: E731
    own.training_step = replaced  # type: ignore[method-assign]
    loss_of(own, ids, SparseFinetuning(), taught)
    assert vars(own).get("training_step") is replaced


def test_manual_optimisation_is_refused(trained, ids: Tensor) -> None:
    """Its backward is over before the callback could add to the loss."""
    module = OwnModule(trained("llama"))
    module.automatic_optimization = False
    with pytest.raises(UserError, match="OwnModule has automatic_optimization false"):
        trainer(Distillation(trained("llama")), max_steps=1).fit(module, DataLoader(ids, batch_size=4))


def test_a_sparse_pretrained_is_no_teacher(tmp_path: Path, sparse: PreTrainedModel, ids: Tensor) -> None:
    sparse.save_pretrained(tmp_path / "sparse")
    module = CausalLM(str(tmp_path / "sparse"))
    with pytest.raises(UserError, match="the model that is trained, is already sparse"):
        trainer(SparseFinetuning(), Distillation(), max_steps=1).fit(module, DataLoader(ids, batch_size=4))


def test_a_dense_model_with_some_zeros_is_a_teacher(trained, ids: Tensor) -> None:
    """Some 4-bit files have 10 %."""
    model = trained("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.flatten()[::10] = 0
    trainer(pruner(), Distillation(), max_steps=1).fit(OwnModule(model), DataLoader(ids, batch_size=8))


@pytest.mark.parametrize("weights", [{"logit_weight": 1.0}, {"logit_weight": 0.0, "feature_weight": 1.0}])
def test_a_mask_that_is_given_by_position_counts(
    trained, sparse: PreTrainedModel, ids: Tensor, weights: dict[str, float]
) -> None:
    mask = torch.ones_like(ids[:4])
    mask[:, 20:] = 0
    windows = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids[:4], mask, strict=True)]

    class ByName(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mean()

    class ByPosition(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.backbone(batch["input_ids"], batch["attention_mask"]).logits.mean()

    found = []
    for kind in (ByName, ByPosition):
        losses = Losses()
        distillation = Distillation(trained("llama"), task_weight=0.0, **weights)  # type: ignore[arg-type]
        run = trainer(SparseFinetuning(), distillation, losses, max_steps=1)
        run.fit(kind(copy.deepcopy(sparse), adamw), DataLoader(windows, batch_size=4))  # type: ignore[arg-type]
        found.append(losses.losses[0])
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("given", [True, False])
def test_the_dtype_of_the_teacher(trained, model_dir: Path, ids: Tensor, given: bool) -> None:
    """Of a model that is given, which stays as it is, and of one that is loaded. Rotary frequencies stay in float32."""
    teacher = trained("llama")
    distillation = Distillation(teacher if given else None, teacher_dtype="bfloat16")
    seen: set[torch.dtype] = set()

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            assert distillation._model is not None
            seen.update(p.dtype for p in distillation._model.parameters())
            assert distillation._model.model.rotary_emb.inv_freq.dtype == torch.float32

    data = DataLoader([{"input_ids": row} for row in ids], batch_size=4)  # type: ignore[arg-type]
    trainer(pruner(), distillation, Look(), max_steps=1).fit(CausalLM(str(model_dir), optimizer=adamw), data)
    assert seen == {torch.bfloat16}
    assert teacher.dtype == torch.float32


def test_logits_of_the_last_positions(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    class Last(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mask = torch.ones_like(batch)
            return self.backbone(batch, attention_mask=mask, logits_to_keep=8).logits.mean()

    losses, distillation = Losses(), Distillation(trained("llama"), task_weight=0.0)
    run = trainer(SparseFinetuning(), distillation, losses, max_steps=1)
    run.fit(Last(copy.deepcopy(sparse), adamw), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    with torch.no_grad():
        student, teacher = (model(ids[:4], logits_to_keep=8).logits for model in (sparse, trained("llama")))
    assert losses.losses == [pytest.approx(0.5 * naive_logit_loss(student, teacher, 1.0, None), rel=1e-4)]
