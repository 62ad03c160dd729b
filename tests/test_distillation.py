"""A dense teacher in the loss: the terms against loops, where the teacher comes from, what it is worth, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import CONFIGS, build_model
from test_callback import OwnModule, trainer
from test_finetuning import Module, ZeroWatch, prune_by_hand, pruner
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from sparsellm_lightning import CausalLM, Distillation, SparseFinetuning, TextDataModule, UserError, perplexity
from sparsellm_lightning.distillation import feature_loss, logit_loss


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.fixture
def ids(calibration: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in calibration])


@pytest.fixture
def sparse(trained) -> PreTrainedModel:
    model = trained("llama")
    prune_by_hand(model)
    return model


# -- the terms --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7), (6, 3)])
def test_logit_loss(shape: tuple[int, ...], masked: bool, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    valid = torch.rand(shape[:-1], generator=generator) < 0.6 if masked else None
    expected = naive_logit_loss(student, teacher, temperature, valid)
    assert float(logit_loss(student, teacher, temperature, valid)) == pytest.approx(expected, rel=1e-5)
    assert float(logit_loss(teacher, teacher, temperature, valid)) == pytest.approx(0, abs=1e-6)
    # The gradient, by differences: so no part of the student is detached.
    student.requires_grad_()
    logit_loss(student, teacher, temperature, valid).backward()
    assert student.grad is not None
    step = torch.zeros_like(student)
    step.view(-1)[1] = 1e-4
    up, down = (naive_logit_loss(student.detach() + s, teacher, temperature, valid) for s in (step, -step))
    assert float(student.grad.view(-1)[1]) == pytest.approx((up - down) / 2e-4, abs=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_feature_loss(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 5, 3, generator=generator) for _ in range(4)] for _ in range(2))
    valid = torch.rand(2, 5, generator=generator) < 0.6 if masked else torch.ones(2, 5, dtype=torch.bool)
    ratios = []
    for s, t in zip(student, teacher, strict=True):
        distance = norm = 0.0
        for row in range(2):
            for position in range(5):
                if valid[row, position]:
                    for a, b in zip(s[row, position].tolist(), t[row, position].tolist(), strict=True):
                        distance += (a - b) ** 2
                        norm += b**2
        ratios.append(distance / norm)
    measured = feature_loss(student, teacher, valid if masked else None)
    assert float(measured) == pytest.approx(sum(ratios) / 4, rel=1e-5)
    assert float(feature_loss([s.bfloat16() for s in student], teacher)) > 0, "taken in float32"


def test_losses_of_bfloat16_are_taken_in_float32() -> None:
    student, teacher = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    measured = logit_loss(student, teacher, 2.0)
    assert measured.dtype == torch.float32
    assert float(measured) == pytest.approx(naive_logit_loss(student, teacher, 2.0, None), rel=1e-5)


# -- the loss of a training step --------------------------------------------------------------------------------------


class Losses(pl.Callback):
    """The loss of every batch, and the student as it was when it was measured."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.student: PreTrainedModel | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.student is None:
            model = pl_module.model if isinstance(pl_module, CausalLM) else pl_module.backbone
            self.student = copy.deepcopy(model)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def forward(model: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the blocks' outputs: the last one is what enters the final norm."""
    final: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: final.append(args[0]))
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    handle.remove()
    return output.logits, [*output.hidden_states[1:-1], final[0]]


def padded_batch(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids[:4])
    mask[1, 40:], mask[2, :10], mask[3, 5:] = 0, 0, 0
    return {"input_ids": ids[:4], "attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_by_hand(trained, model_dir: Path, ids: Tensor, padded: bool) -> None:
    """``task · L + logit · KL + feature · distance``, over the tokens that count."""
    inputs = padded_batch(ids) if padded else {"input_ids": ids[:4]}
    items = [{key: value[row] for key, value in inputs.items()} for row in range(4)]
    module = CausalLM(str(model_dir), optimizer=adamw)
    losses = Losses()
    weights = {"task_weight": 0.3, "logit_weight": 0.6, "feature_weight": 0.2, "temperature": 2.0}
    fit = trainer(Distillation(**weights), pruner(), losses, max_steps=1)
    fit.fit(module, DataLoader(items, batch_size=4))
    assert losses.student is not None
    student_logits, student_features = forward(losses.student, **inputs)
    teacher_logits, teacher_features = forward(trained("llama"), **inputs)
    valid = inputs.get("attention_mask", torch.ones_like(ids[:4])).bool()

    labels = ids[:4].masked_fill(~valid, -100)[:, 1:]
    task = torch.nn.functional.cross_entropy(student_logits[:, :-1].flatten(0, 1), labels.flatten())
    chosen = slice(0, None, 7) if not padded else slice(None)
    divergence = naive_logit_loss(student_logits[valid], teacher_logits[valid], 2.0, None)
    distance = sum(
        float((s[valid] - t[valid]).double().square().sum() / t[valid].double().square().sum())
        for s, t in zip(student_features, teacher_features, strict=True)
    )
    assert len(student_features) == 3
    expected = 0.3 * float(task) + 0.6 * divergence + 0.2 * distance / 3
    assert losses.losses == [pytest.approx(expected, rel=1e-4)]
    logged = fit.logged_metrics
    assert float(logged["distillation_logit_loss"]) == pytest.approx(divergence, rel=1e-4)
    assert float(logged["distillation_feature_loss"]) == pytest.approx(distance / 3, rel=1e-4)
    assert chosen is not None


class Dict(Module):
    """Returns a dictionary from a step that takes the batch only; every third batch is left out."""

    def training_step(self, batch: Tensor) -> Any:  # type: ignore[override]
        self.batches_seen += 1
        if self.batches_seen % 3 == 0:
            return None
        return {"loss": self.backbone(batch, labels=batch).loss, "more": torch.tensor(self.batches_seen)}


class Twice(Module):
    """Two forwards a step, as of contrastive losses."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        halves = batch.chunk(2)
        return self.backbone(halves[0], labels=halves[0]).loss + self.backbone(input_ids=halves[1]).logits.mean()


def loss_of(
    module: pl.LightningModule, ids: Tensor, *callbacks: pl.Callback, steps: int = 1, **settings: Any
) -> Losses:
    losses = Losses()
    trainer(*callbacks, losses, max_steps=steps, **settings).fit(module, DataLoader(ids, batch_size=4))
    return losses


def test_steps_of_other_shapes(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    """A step without batch index, of a dictionary, of None; and two forwards in one step: both are compared."""
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


@pytest.mark.parametrize("compiled", [False, True])
def test_features_of_compiled_or_checkpointed_blocks(trained, ids: Tensor, compiled: bool) -> None:
    """Blocks that are compiled one by one, or computed again in the backward pass, show their outputs all the same."""
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


# -- the teacher ------------------------------------------------------------------------------------------------------


def test_every_kind_of_teacher(trained, model_dir: Path, ids: Tensor) -> None:
    """A path, a model, the module's own ``pretrained``, a copy of what the run begins with: the same dense teacher."""
    given = trained("llama")
    before = copy.deepcopy(given.state_dict())
    losses = {}
    for kind, teacher in {"path": str(model_dir), "model": given, "copy": None}.items():
        for first in (True, False):
            held, taught = pruner(), Distillation(teacher, task_weight=0.0)
            callbacks = [taught, held] if first else [held, taught]
            losses[kind, first] = loss_of(Module(trained("llama"), adamw), ids, *callbacks, steps=2).losses
    dense = [{"input_ids": row} for row in ids]
    losses["pretrained", True] = loss_of(
        CausalLM(str(model_dir), optimizer=adamw), dense, pruner(), Distillation(task_weight=0.0), steps=2
    ).losses
    expected = losses["model", True]
    assert expected[0] > 0.1, "the student is sparse, the teacher not"
    for key, found in losses.items():
        assert found == pytest.approx(expected, rel=1e-5), key
    assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items()), (
        "the teacher is not trained"
    )
    assert all(p.grad is None for p in given.parameters())


def test_teacher_in_bfloat16(trained, model_dir: Path, ids: Tensor) -> None:
    seen: set[torch.dtype] = set()

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            (taught,) = (c for c in trainer.callbacks if isinstance(c, Distillation))
            assert taught._model is not None
            seen.update(p.dtype for p in taught._model.parameters())
            assert not taught._model.training

    losses = []
    for teacher, dtype in ((str(model_dir), "auto"), (str(model_dir), "bfloat16"), (None, "bfloat16")):
        seen.clear()
        taught = Distillation(teacher, task_weight=0.0, logit_weight=1.0, teacher_dtype=dtype)
        losses.append(loss_of(Module(trained("llama"), adamw), ids, pruner(), taught, Look()).losses[0])
        assert seen == {torch.float32 if dtype == "auto" else torch.bfloat16}
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.05)
    assert losses[1] != losses[0]


def test_offloaded_teacher(trained, sparse: PreTrainedModel, ids: Tensor, monkeypatch) -> None:
    """Every part of the teacher is brought and sent back for every batch, one after the other; the loss is the same."""
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
        # Sent to the host at the start; brought and sent back in both steps.
        assert len([1 for moved, _ in moves if moved is part]) == 1 + 2 * 2, type(part).__name__
    assert teacher not in [moved for moved, _ in moves], "never as a whole"


def test_offloading_leaves_a_given_teacher_as_it_was(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    """Its hooks go with the run: they would move a model that is used for something else."""
    teacher = trained("llama")
    loss_of(Module(sparse, adamw), ids, SparseFinetuning(), Distillation(teacher, offload=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(trained, model_dir: Path, ids: Tensor, precision: str) -> None:
    watch = ZeroWatch()
    module = Module(trained("llama"), lambda p: torch.optim.AdamW(p, lr=1e-2))
    taught = Distillation(str(model_dir), feature_weight=0.1)
    losses = loss_of(module, ids, pruner(), taught, watch, steps=4, precision=precision).losses
    assert watch.looks == 4 * 3 + 1
    assert all(math.isfinite(loss) for loss in losses)


def test_distillation_is_worth_it(trained, text: TextDataModule) -> None:
    """A model pruned to 80 % ends better with its teacher than with the text alone, after the same steps."""

    class Tokens(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.backbone(**batch).loss

    held = pruner(sparsity=0.8, finetune=False, num_calibration_samples=64)
    start = Tokens(trained("llama"), adamw)
    trainer(held, limit_val_batches=0).fit(start, text.train_dataloader())
    pruned = perplexity(start.backbone, text.test_dataloader())
    reached = {}
    for name, taught in {"alone": [], "taught": [Distillation(trained("llama"))]}.items():
        module = Tokens(copy.deepcopy(start.backbone), adamw)
        trainer(SparseFinetuning(), *taught, max_steps=30, limit_val_batches=0).fit(module, text.train_dataloader())
        reached[name] = perplexity(module.backbone, text.test_dataloader())
    assert reached["taught"] < reached["alone"] < pruned


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_weight": -0.1}, "weights of at least 0"),
        ({"task_weight": -1.0}, "weights of at least 0"),
        ({"feature_weight": -1.0}, "weights of at least 0"),
        ({"logit_weight": 0.0}, "above 0"),
        ({"logit_weight": float("nan")}, "weights of at least 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_refused_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(**settings)  # type: ignore[arg-type]


def test_a_copy_must_be_dense(tmp_path: Path, trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    loader = DataLoader(ids, batch_size=4)
    with pytest.raises(UserError, match=r"already sparse.*Give teacher"):
        trainer(SparseFinetuning(), Distillation(), max_steps=1).fit(Module(sparse, adamw), loader)
    # A run that pruned is resumed: the dense model is gone.
    first = trainer(pruner(), Distillation(), max_steps=1)
    first.fit(Module(trained("llama"), adamw), loader)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(UserError, match=r"resumes a run.*Give teacher"):
        trainer(pruner(), Distillation(), max_steps=2).fit(
            Module(trained("llama"), adamw), loader, ckpt_path=tmp_path / "stopped.ckpt"
        )
    trained("llama").save_pretrained(tmp_path / "dense")
    trainer(pruner(), Distillation(str(tmp_path / "dense")), max_steps=2).fit(
        Module(trained("llama"), adamw), loader, ckpt_path=tmp_path / "stopped.ckpt"
    )


def test_teachers_that_do_not_fit(model_dir: Path, sparse: PreTrainedModel, ids: Tensor) -> None:
    loader = DataLoader(ids, batch_size=4)
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 600
    with pytest.raises(UserError, match=r"shapes \(4, 64, 512\) and \(4, 64, 600\).*head and vocabulary"):
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
    with pytest.raises(UserError, match="3 blocks of the student and 2 of the teacher"):
        trainer(SparseFinetuning(), taught, max_steps=1).fit(Module(sparse, adamw), loader)


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

    with pytest.raises(UserError, match="made none through the model's own forward"):
        loss_of(Parts(sparse, adamw), ids, SparseFinetuning(), Distillation(trained("llama")))


# -- afterwards -------------------------------------------------------------------------------------------------------


def test_the_training_step_is_restored(trained, sparse: PreTrainedModel, ids: Tensor) -> None:
    """Also after an error, and also a step that the user had put on the instance."""

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
    # The same callback again.
    assert loss_of(module, ids, SparseFinetuning(), taught).losses

    own = Module(copy.deepcopy(sparse), adamw)
    replaced = lambda batch, batch_idx: 2 * OwnModule.training_step(own, batch, batch_idx)  # noqa: E731
    own.training_step = replaced  # type: ignore[method-assign]
    loss_of(own, ids, SparseFinetuning(), taught)
    assert vars(own).get("training_step") is replaced


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_the_logit_loss(masked: bool) -> None:
    """Over more tokens than one step of it, against autograd through the plain formula."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 90, 7, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 90, 7, generator=generator)
    valid = torch.rand(3, 90, generator=generator) < 0.7 if masked else None
    (ours,) = torch.autograd.grad(0.7 * logit_loss(student, teacher, 2.0, valid), student)
    s, t = (student, teacher) if valid is None else (student[valid], teacher[valid])
    q, p = torch.log_softmax(s / 2, -1), torch.log_softmax(t / 2, -1)
    (expected,) = torch.autograd.grad(0.7 * 4 * (p.exp() * (p - q)).sum(-1).mean(), student)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-8)
