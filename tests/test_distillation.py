"""A dense teacher in the loss: against naive sums, by hand for one batch, and by what it does to a pruned model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_callback import OwnModule, trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    perplexity,
)
from sparsellm_lightning.distillation import feature_loss, logit_loss


@pytest.fixture
def ids(calibration) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in calibration])


def pruner(sparsity: float = 0.7) -> SparseLLMCallback:
    return SparseLLMCallback(sparsity=sparsity, finetune=True, num_calibration_samples=16, num_iterations=2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_logit_loss(temperature: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]]) if masked else torch.ones(2, 3, dtype=torch.bool)
    total = 0.0
    for b, t in valid.nonzero().tolist():
        p = torch.softmax(teacher[b, t].double() / temperature, 0)
        q = torch.softmax(student[b, t].double() / temperature, 0)
        total += float(sum(p[k] * (p[k] / q[k]).log() for k in range(5)))
    expected = temperature**2 * total / int(valid.sum())
    loss = logit_loss(student, teacher, temperature, valid if masked else None)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(logit_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("valid", [None, torch.rand(3, 90, generator=torch.Generator().manual_seed(3)) < 0.7])
def test_gradient_of_the_logit_loss(valid: Tensor | None) -> None:
    """Over more tokens than one step of it, against autograd through the plain formula."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 90, 7, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 90, 7, generator=generator)
    (0.7 * logit_loss(student, teacher, 2.0, valid)).backward()
    (ours,), student.grad = (student.grad.clone(),), None  # type: ignore[union-attr]
    s, t = (student, teacher) if valid is None else (student[valid], teacher[valid])
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
    """Notes the loss that is trained."""

    loss: Tensor

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None: ...

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.loss = loss.detach()
        super().backward(loss, *args, **kwargs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        output = self.backbone(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        return {"loss": output.loss}


def test_the_loss_by_hand(trained, ids: Tensor) -> None:
    """Padded windows, all three terms, against plain transformers with all hidden states."""
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
    assert "training_step" not in vars(module), "the module is as it was"
    assert not any(p.requires_grad for p in teacher.parameters())


def test_distilled_ends_lower(model_dir: Path, text: TextDataModule) -> None:
    """From the same pruned model, with the same windows, steps and optimizer."""
    ends = {}
    for name, more in (("task alone", []), ("distilled", [Distillation(task_weight=0.2, logit_weight=0.8)])):
        pl.seed_everything(0, verbose=False)
        module = CausalLM(str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
        data = TextDataModule(sequence_length=64, batch_size=8, max_eval_windows=32, max_train_windows=64)
        keeper = pruner(0.85)
        trainer(keeper, *more, max_steps=60).fit(module, data)
        assert keeper.report is not None
        ends[name] = keeper.report.perplexity["finetuned"]
        assert ends[name] < keeper.report.perplexity["pruned"]
    assert ends["distilled"] < ends["task alone"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_frozen_copy_is_of_the_dense_model(trained, ids: Tensor, order: int) -> None:
    dense = trained("opt")
    distillation = Distillation()
    taught: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            assert distillation._model is not None
            taught.append(copy.deepcopy(distillation._model.state_dict()))

    module = OwnModule(copy.deepcopy(dense))
    trainer(*[pruner(), distillation, Watch()][::order], max_steps=2).fit(module, DataLoader(ids, batch_size=8))
    for state in taught:
        assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert distillation._model is None, "its memory is given back"


def test_memory_savers(model_dir: Path) -> None:
    """A bfloat16 teacher that comes to its device block by block gives nearly the loss of a plain one."""
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
        ({"temperature": 0.0}, "temperature must be positive"),
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


def test_another_vocabulary(trained, ids: Tensor) -> None:
    other = trained("llama")
    other.resize_token_embeddings(600)
    with pytest.raises(UserError, match="same head and vocabulary"):
        trainer(Distillation(other), max_steps=1).fit(OwnModule(trained("llama")), DataLoader(ids, batch_size=8))


def test_a_path_as_teacher_of_an_own_module(model_dir: Path, ids: Tensor) -> None:
    module = OwnModule(AutoModelForCausalLM.from_pretrained(model_dir))
    fit = trainer(pruner(), Distillation(str(model_dir)), max_steps=3)
    fit.fit(module, DataLoader(ids, batch_size=8))
    assert float(fit.callback_metrics["distillation_logit_loss"]) > 0
    assert perplexity(module.backbone, [{"input_ids": ids[:8]}]) > 1
