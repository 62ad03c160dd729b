"""Zeros outside Lightning: a plain loop, Hugging Face's Trainer, and a plain merge of LoRA adapters."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from support.models import VOCABULARY, build_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sparsellm_lightning import KeepZeros, LoraOptions, MaskError, PruningConfig, UserError, holding_zeros, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.sparsity import add_adapters

IDS = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))


def sparse(name: str = "llama") -> PreTrainedModel:
    model = build_model(name)
    prune_model(model, [IDS], PruningConfig(sparsity=0.6, preset="paper", method="magnitude"))
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {p.name: p.matrix == 0 for p in describe(model).projections()}  # type: ignore[arg-type]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(mask, b[name]) for name, mask in a.items())


class Mixing(torch.optim.SGD):
    """Moves every weight of a row by the row's mean gradient, so that masked gradients alone keep no zero."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.dim() > 1 and parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad.mean(-1, keepdim=True))
        return loss


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "Mixing"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_plain_loop(name: str, optimizer: str) -> None:
    model = sparse(name)
    before, start = zeros(model), {p.name: p.matrix.clone() for p in describe(model).projections()}
    made = (Mixing if optimizer == "Mixing" else getattr(torch.optim, optimizer))(model.parameters(), lr=1e-2)
    with holding_zeros(model):
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            for p in describe(model).projections():
                assert not bool(p.of(p.parameter.grad)[p.matrix == 0].any())  # type: ignore[arg-type]
            made.step()
            made.zero_grad()
    assert same(before, zeros(model))
    for p in describe(model).projections():
        assert float((p.matrix != start[p.name])[~before[p.name]].float().mean()) > 0.5, f"{p.name} stands still"
    # Outside, nothing is held any more.
    model(input_ids=IDS, labels=IDS).loss.backward()
    made.step()
    assert not same(before, zeros(model))


def test_changes_by_other_means_are_noticed() -> None:
    model = sparse()
    with pytest.raises(MaskError, match="must keep the"), holding_zeros(model):
        model.model.layers[0].mlp.up_proj.weight.data.add_(1)
    with (
        pytest.raises(UserError, match=r"no linear layer of LlamaForCausalLM has any"),
        holding_zeros(build_model("llama")),
    ):
        pass


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **options,
    )


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_hugging_face_trainer(held: bool, accumulation: int, tmp_path: Path) -> None:
    model = sparse()
    before, start = zeros(model), {p.name: p.matrix.clone() for p in describe(model).projections()}
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation),
        train_dataset=data,
        callbacks=[KeepZeros()] if held else [],
    )
    trainer.train()
    assert same(before, zeros(model)) == held
    for p in describe(model).projections():
        assert float((p.matrix != start[p.name])[~before[p.name]].float().mean()) > 0.9, f"{p.name} stands still"
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "nothing is held after the training"


@pytest.mark.parametrize("held", [True, False])
def test_a_plain_merge_of_adapters(held: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = sparse()
    before = zeros(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(
        model=adapted, args=arguments(tmp_path), train_dataset=data, callbacks=[KeepZeros()] if held else []
    )
    trainer.train()
    with torch.no_grad():
        trained = adapted.eval()(input_ids=IDS).logits
    merged = adapted.merge_and_unload()
    assert same(before, zeros(merged)) == held
    torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-3, atol=1e-4)


def test_adapters_that_are_loaded_from_a_file(tmp_path: Path) -> None:
    """A file of adapters holds no masks. The context puts them on again, before a merge."""
    model = sparse()
    dense_start, before = copy.deepcopy(model), zeros(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    made = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    with holding_zeros(adapted):
        for _ in range(3):
            adapted(input_ids=IDS, labels=IDS).loss.backward()
            made.step()
            made.zero_grad()
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = adapted.eval()(input_ids=IDS).logits
    for held in (True, False):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(dense_start), tmp_path)
        with holding_zeros(loaded) if held else nullcontext():
            pass
        merged = loaded.merge_and_unload().eval()
        assert same(before, zeros(merged)) == held
        if held:
            torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-3, atol=1e-4)


def test_adapters_alone_are_trained() -> None:
    model = sparse()
    add_adapters(model, LoraOptions(rank=4))
    base = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    made = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with holding_zeros(model):
        model(input_ids=IDS, labels=IDS).loss.backward()
        made.step()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name), "B starts at zero"


def test_masks_that_are_computed_in_every_forward_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with (
        pytest.raises(UserError, match=r"zeros of 0 are computed .* torch\.nn\.utils\.prune\.remove"),
        holding_zeros(model),
    ):
        pass
    prune.remove(model[0], "weight")
    with holding_zeros(model) as masks:
        assert masks.zeros == {"0": 32}


def test_deepspeed_is_refused() -> None:
    with pytest.raises(UserError, match="does not reach DeepSpeed's copies"):
        KeepZeros().on_train_begin(SimpleNamespace(deepspeed="zero2.json"), None, None, model=nn.Linear(2, 2))


def test_fsdp_is_refused() -> None:
    with pytest.raises(UserError, match="Leave fsdp out, or use SparseFinetuning"):
        KeepZeros().on_train_begin(SimpleNamespace(fsdp="full_shard"), None, None, model=nn.Linear(2, 2))


def test_fsdp_of_accelerate_s_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shards without an argument of the Trainer."""
    model = nn.Sequential(nn.Linear(2, 2))
    monkeypatch.setattr("sparsellm_lightning.callbacks.elsewhere.FSDPModule", nn.Linear)
    with pytest.raises(UserError, match="Leave fsdp out, or use SparseFinetuning"):
        KeepZeros().on_train_begin(SimpleNamespace(), None, None, model=model)


def test_a_new_training_after_one_that_failed() -> None:
    """The model may have other weights by then."""
    model, keeper = nn.Linear(8, 8), KeepZeros()
    model.weight.data[:, :4] = 0
    keeper.on_train_begin(SimpleNamespace(), None, None, model=model)
    model.weight.data = torch.eye(8)
    keeper.on_train_begin(SimpleNamespace(), None, None, model=model)
    keeper.on_train_end(SimpleNamespace(), None, None)


def test_biases_of_adapters_are_refused() -> None:
    model = build_model("opt")
    with torch.no_grad():
        for p in describe(model).projections():
            p.parameter[:, ::2] = 0
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(UserError, match="lora_bias is true"), holding_zeros(adapted):
        pass
