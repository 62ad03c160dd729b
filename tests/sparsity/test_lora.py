"""LoRA on sparse layers: the merged model has the logits of the trained one, and its zeros."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import build_model
from support.training import OwnModule, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm_lightning import (
    CausalLM,
    Distillation,
    LoraOptions,
    SparseFinetuning,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    verify_export,
)
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.sparsity import add_adapters, linear_layers, mask_adapters, merged_state, zero_shares

peft = pytest.importorskip("peft")


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {p.name: p.parameter.detach() for p in describe(model).projections()}


def prune_by_hand(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for weight in weights(model).values():
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.6, 0)
    return model


def disturb_adapters(model: nn.Module) -> None:
    """Random B, as after training. A fresh adapter has B = 0 and changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids[:4]).logits


def test_options_of_the_adapters(model_dir: Path) -> None:
    module = CausalLM(str(model_dir), lora=LoraOptions(rank=4, alpha=12, dropout=0.2))
    module.configure_model()
    (layer, *_) = (m for m in module.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    assert layer.r["default"] == 4
    assert layer.scaling["default"] == 3
    assert layer.lora_dropout["default"].p == 0.2


def test_prune_train_export(tmp_path: Path, model_dir: Path, ids: Tensor) -> None:
    module = CausalLM(
        str(model_dir), optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3), lora=LoraOptions(rank=4, dropout=0.2)
    )
    data = TextDataModule(sequence_length=32, batch_size=8, max_eval_windows=32)
    pruner = SparseLLMCallback(
        preset="paper",
        method="sparsegpt",
        sparsity=0.7,
        finetune=True,
        num_calibration_samples=16,
        export_dir=str(tmp_path / "out"),
    )
    pruned: dict[str, Tensor] = {}
    original = pruner.hold
    pruner.hold = lambda *args: (original(*args), pruned.update(copy.deepcopy(weights(module.model))))[0]  # type: ignore[method-assign, func-returns-value]
    trainer(pruner, max_steps=40).fit(module, data)

    assert pruner.report is not None
    assert pruner.report.perplexity["finetuned"] < pruner.report.perplexity["pruned"]
    assert all(torch.equal(weight, pruned[name]) for name, weight in weights(module.model).items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, ids), logits(module.model, ids), rtol=1e-4, atol=1e-4)
    for name, weight in weights(plain).items():
        assert torch.equal(weight == 0, pruned[name] == 0), name
        assert not torch.equal(weight, pruned[name]), "the adapter is merged"


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_unmerge_loses_no_kept_weight(trained, name: str) -> None:
    """A weight far below its update rounds to the update in the merge, and to zero when the update is taken off again."""
    model = prune_by_hand(build_model(name) if name == "mixtral" else trained(name)).to(torch.bfloat16)
    sparse = {p.module for p in describe(model).projections()}
    for weight in weights(model).values():
        weight.data *= 1e-6
    kept = {key: weight != 0 for key, weight in weights(model).items()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    disturb_adapters(model)
    mask_adapters(model, sparse)
    model.merge_adapter()
    model.unmerge_adapter()
    for key, weight in weights(model.unload()).items():
        assert torch.equal(weight != 0, kept[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_merging_a_peft_model(trained, ids: Tensor, name: str) -> None:
    """The user's own peft model, merged by peft. GPT-2 stores its weights transposed, Mixtral those of all experts together."""
    model = prune_by_hand(build_model(name) if name == "mixtral" else trained(name))
    zeros = {key: weight == 0 for key, weight in weights(model).items()}
    sparse = {p.module for p in describe(model).projections()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    model = peft.get_peft_model(model, config)
    disturb_adapters(model)
    filled = copy.deepcopy(model).merge_and_unload()
    assert any((weight[zeros[key]] != 0).any() for key, weight in weights(filled).items()), "plain LoRA fills the zeros"

    mask_adapters(model, sparse)
    before = logits(model, ids)
    state = merged_state(model.get_base_model(), model.get_base_model().state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, ids), before, rtol=1e-4, atol=1e-4)
    for key, weight in weights(merged).items():
        assert (weight[zeros[key]] == 0).all(), key
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_zeros_of_layers_without_a_mask(trained, ids: Tensor, share: float) -> None:
    """Few zeros, as in some 4-bit files, are filled as in training. Many are those of a sparse layer, loaded again."""
    model = trained("llama")
    generator = torch.Generator().manual_seed(0)
    for weight in weights(model).values():
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < share, 0)
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    plain = copy.deepcopy(model)
    add_adapters(model, LoraOptions(rank=4))
    disturb_adapters(model)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    filled = any(bool((weight[zeros[name]] != 0).any()) for name, weight in weights(plain).items())
    assert filled == (share < 0.2)
    if filled:
        torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_the_report_counts_the_zeros_of_the_export(trained, ids: Tensor, tmp_path: Path) -> None:
    """Adapters fill the few zeros of layers that are not pruned."""
    module = OwnModule(trained("llama"))
    generator = torch.Generator().manual_seed(0)
    for weight in weights(module.backbone).values():
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.1, 0)
    add_adapters(module.backbone, LoraOptions(rank=4))
    pruner = SparseLLMCallback(
        **{"preset": "paper", "method": "magnitude", "sparsity": 0.5, "ignore": ["*.self_attn.*"], "finetune": True},
        export_dir=str(tmp_path / "out"),
        measure=False,
    )
    trainer(pruner, max_steps=2).fit(module, DataLoader(ids, batch_size=4))
    assert verify_export(tmp_path / "out") == []
    shares = [
        layer["sparsity"] for layer in json.loads((tmp_path / "out" / "pruning_report.json").read_text())["layers"]
    ]
    assert min(shares) == 0
    assert max(shares) >= 0.5


def test_layers_of_zeros_alone_are_trained(trained, ids: Tensor) -> None:
    """They are fresh: training masks nothing there, and the merge keeps what was trained."""
    model = trained("llama")
    next(iter(weights(model).values())).zero_()
    plain = copy.deepcopy(model)
    add_adapters(model, LoraOptions(rank=4))
    disturb_adapters(model)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_adapters_that_are_switched_off_are_not_merged(trained) -> None:
    model = trained("llama")
    dense = {name: weight.clone() for name, weight in weights(model).items()}
    add_adapters(model, LoraOptions(rank=4))
    disturb_adapters(model)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.enable_adapters(False)
    merged = merged_state(model, model.state_dict())
    assert all(torch.equal(merged[f"{name}.weight"], weight) for name, weight in dense.items())


def test_sparse_finetuning_masks_adapters(trained, ids: Tensor) -> None:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = peft.get_peft_model(
                prune_by_hand(trained("llama")), peft.LoraConfig(r=4, target_modules="all-linear")
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)

    module = Module()
    trainer(SparseFinetuning(), max_steps=10).fit(module, DataLoader(ids, batch_size=8))
    expected = logits(module.net, ids)
    merged = module.net.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    original = prune_by_hand(trained("llama"))
    for name, weight in weights(merged).items():
        assert torch.equal(weight == 0, weights(original)[name] == 0), name
        assert not torch.equal(weight, weights(original)[name]), name


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_of_adapters_is_evaluated_as_it_was_trained(
    trained, ids: Tensor, tmp_path: Path, command: str
) -> None:
    prune_by_hand(trained("llama")).save_pretrained(tmp_path / "sparse")

    def module() -> CausalLM:
        return CausalLM(
            str(tmp_path / "sparse"), lora=LoraOptions(rank=4), optimizer=lambda p: torch.optim.AdamW(p, lr=5e-2)
        )

    data = DataLoader(ids, batch_size=8)
    fit, tuned = trainer(SparseFinetuning(), max_steps=4), module()
    fit.fit(tuned, data)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    (expected,) = getattr(fit, command)(tuned, data)
    again = trainer(SparseFinetuning())
    (found,) = getattr(again, command)(module(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert found == expected
    (unmasked,) = getattr(trainer(), command)(module(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert unmasked != expected


def test_dora_is_refused(trained) -> None:
    model = prune_by_hand(trained("llama"))
    sparse = {p.module for p in describe(model).projections()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    with pytest.raises(UserError, match="plain LoRA"):
        mask_adapters(model, sparse)


def test_options(model_dir: Path) -> None:
    with pytest.raises(UserError, match="rank of at least 1"):
        LoraOptions(rank=0)
    with pytest.raises(UserError, match="must name layers"):
        CausalLM(str(model_dir), lora=LoraOptions(target_modules=["no_such_layer"])).configure_model()


class Peft(OwnModule):
    """A user's module around a user's own peft model."""

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        super().__init__(model)
        self.backbone = peft.get_peft_model(model, config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.backbone(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


def test_pruning_a_peft_model_in_an_own_module(tmp_path: Path, trained, ids: Tensor) -> None:
    """A peft model with dropout on its adapters is pruned, trained and exported as plain weights."""
    module = Peft(trained("llama"), peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    pruner = SparseLLMCallback(
        preset="paper",
        method="sparsegpt",
        sparsity=0.7,
        finetune=True,
        num_calibration_samples=16,
        export_dir=str(tmp_path / "out"),
    )
    trainer(pruner, max_steps=10).fit(module, DataLoader(ids, batch_size=8))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, ids), logits(module.backbone, ids), rtol=1e-4, atol=1e-4)
    for name, weight in weights(module.backbone.get_base_model()).items():
        assert torch.equal(weights(plain)[name] == 0, weight == 0), name
        assert not torch.equal(weights(plain)[name], weight), name


def test_distillation_into_a_peft_model(trained, ids: Tensor) -> None:
    """The hooks of the model inside are called, which peft before 0.21 passed by."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    module = Peft(prune_by_hand(trained("llama")), config)
    fit = trainer(SparseFinetuning(), Distillation(trained("llama")), max_steps=2)
    fit.fit(module, DataLoader(ids, batch_size=8))
    assert float(fit.callback_metrics["distillation_logit_loss"]) > 0


def test_adapters_are_not_taken_for_sparse_layers(trained) -> None:
    """Rows of B are zero behind units that are never active. They are not pruned weights and must not be held."""
    model = prune_by_hand(trained("opt"))
    expected = {p.name for p in describe(model).projections()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    disturb_adapters(model)
    for name, parameter in model.named_parameters():
        if "fc1.lora_B" in name:
            parameter.data[:32] = 0
    shares = zero_shares(linear_layers(model), StrategyAdapter())
    assert {name.removeprefix("base_model.model.") for name, share in shares.items() if share > 0} == expected


def test_ia3_is_let_through(trained, ids: Tensor) -> None:
    """IA3 scales rows and columns, which keeps every zero."""
    module = Peft(prune_by_hand(trained("llama")), peft.IA3Config(task_type="CAUSAL_LM"))
    trainer(SparseFinetuning(), max_steps=3).fit(module, DataLoader(ids, batch_size=8))
    expected = logits(module.backbone, ids)
    merged = module.backbone.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)
    original = weights(prune_by_hand(trained("llama")))
    changed = 0
    for name, weight in weights(merged).items():
        assert torch.equal(weight == 0, original[name] == 0), name
        changed += not torch.equal(weight, original[name])
    assert changed >= 3


def test_adapters_on_embeddings_are_refused(model_dir: Path) -> None:
    with pytest.raises(UserError, match="embedding"):
        CausalLM(str(model_dir), lora=LoraOptions(target_modules=["q_proj", "embed_tokens"])).configure_model()


def test_adapters_outside_the_blocks(tmp_path: Path, model_dir: Path, ids: Tensor) -> None:
    """An adapter on a head that is not tied is merged into the exported weights too."""
    module = CausalLM(
        str(model_dir),
        optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3),
        lora=LoraOptions(rank=4, target_modules=["q_proj", "lm_head"]),
    )
    pruner = SparseLLMCallback(
        preset="paper",
        method="sparsegpt",
        sparsity=0.7,
        finetune=True,
        num_calibration_samples=8,
        export_dir=str(tmp_path / "out"),
    )
    trainer(pruner, max_steps=5).fit(module, TextDataModule(sequence_length=32, batch_size=8, max_eval_windows=4))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, ids), logits(module.model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (peft.IA3Config(task_type="CAUSAL_LM"), "IA3|Linear"),
        (
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "modules_to_save",
        ),
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True), "Dora"),
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True), "lora_bias"),
    ],
    ids=["ia3", "modules_to_save", "dora", "lora_bias"],
)
def test_what_an_export_cannot_merge_is_refused_before_pruning(
    trained, ids: Tensor, tmp_path: Path, config: Any, named: str
) -> None:
    module = Peft(trained("llama"), config)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pruner = SparseLLMCallback(sparsity=0.5, finetune=True, export_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"An export merges plain LoRA adapters, but .* has .*({named})"):
        trainer(pruner, max_steps=2).fit(module, DataLoader(ids, batch_size=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_what_masks_cannot_cover_is_refused_before_pruning(trained, ids: Tensor, option: str) -> None:
    """Also if nothing is exported."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **{option: True})
    module = Peft(trained("llama"), config)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError, match="Adapters on a sparse layer"):
        trainer(SparseLLMCallback(sparsity=0.5, finetune=True), max_steps=2).fit(module, DataLoader(ids, batch_size=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_no_matrix_is_kept_for_the_backward(trained, ids: Tensor) -> None:
    """Neither masks nor updates, which would take three bytes a weight."""
    model = prune_by_hand(trained("llama"))
    sparse = {p.module for p in describe(model).projections()}
    add_adapters(model, LoraOptions(rank=2))
    mask_adapters(model, sparse)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(p.shape) for p in describe(model).projections()} | {
        (p.shape[1], p.shape[0]) for p in describe(model).projections()
    }
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters and tuple(tensor.shape) in shapes:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids[:1, :8], labels=ids[:1, :8]).loss
    loss.backward()
    assert kept == []
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merge_makes_no_zeros(trained, dtype: torch.dtype) -> None:
    """Where the update takes a kept weight to zero, or below what its dtype holds."""
    model = prune_by_hand(trained("llama")).to(dtype)
    layer = model.model.layers[0].mlp.up_proj
    kept = layer.weight != 0
    add_adapters(model, LoraOptions(rank=4, alpha=4, target_modules=["up_proj"]))
    mask_adapters(model, {p.module for p in describe(model).projections()})
    adapted: Any = model.model.layers[0].mlp.up_proj
    with torch.no_grad():  # the update of the first row is the negative of its weights
        adapted.lora_A["default"].weight[0] = -adapted.base_layer.weight[0]
        adapted.lora_B["default"].weight[:, 0] = torch.eye(len(kept), 1)[:, 0]
    state = merged_state(model, model.state_dict())
    merged = state["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(merged != 0, kept)
    assert float(merged[0].abs().max()) < 1e-3
    for safe in (True, False):
        model = copy.deepcopy(model)
        model.model.layers[0].mlp.up_proj.merge(safe_merge=safe)
        assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight != 0, kept)
        model.model.layers[0].mlp.up_proj.unmerge()
