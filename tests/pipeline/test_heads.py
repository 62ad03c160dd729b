"""Pattern heads: which heads leave, what is left, and the smaller model that is exported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import VOCABULARY, build_model
from support.training import OwnModule, exported_smaller, trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sparsellm_lightning import PruningConfig, SparseLLMCallback, UserError, perplexity, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.data import TextDataModule

HEADS: dict[str, Any] = {"pattern": "heads", "sparsity": 0.5, "num_calibration_samples": 8}


def llama(key_value_heads: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        head_dim=24,
        attention_bias=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "grouped": lambda: llama(2),
    "multi-head": lambda: llama(4),
    "multi-query": lambda: llama(1),
    **{name: lambda name=name: build_model(name) for name in ("qwen3", "gemma3", "phi3", "mixtral")},  # type: ignore[misc]
}


@pytest.mark.parametrize("preset", ["paper", "balanced"])
@pytest.mark.parametrize("name", MODELS)
def test_the_export_is_smaller_and_gives_the_same_logits(name: str, preset: str, tmp_path: Path) -> None:
    steps = {"reconstruction_steps": 3, "distillation_steps": 2} if preset == "balanced" else {}
    model, dense = MODELS[name](), MODELS[name]()
    smaller, _ = exported_smaller(model, tmp_path / "out", name == "phi3", **{**HEADS, **steps}, preset=preset)
    for block in describe(model).blocks:
        attention = block.attention
        assert attention is not None
        size = attention.output.shape[1] // attention.removable
        kept = attention.output.matrix.any(0).view(-1, size).any(1)
        assert int(kept.sum()) == attention.removable // 2
        rows = attention.rows(kept)
        for p in attention.projections:
            if p.name in rows:
                assert torch.equal(p.matrix.any(1), rows[p.name])
    for block, full in zip(describe(smaller).blocks, describe(dense).blocks, strict=True):
        assert block.attention is not None
        assert full.attention is not None
        assert block.attention.heads == full.attention.heads // 2
        assert block.attention.head_size == full.attention.head_size
        assert block.attention.groups == max(full.attention.groups // 2, 1)


def test_trained_model(trained: Callable[[str], PreTrainedModel], text: TextDataModule) -> None:
    """One of two key-value heads: the surgeon and its refit lose less than Wanda's score and than magnitude."""
    dense, lost = perplexity(trained("llama"), text.val_dataloader()), {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        model = trained("llama")
        config = PruningConfig(**{**HEADS, "num_calibration_samples": 128}, preset="paper", method=method)
        prune_model(model, text.train_dataloader(), config)
        lost[method] = math.log(perplexity(model, text.val_dataloader()) / dense)
    assert 0 < lost["sparsegpt"] < 0.9 * min(lost["wanda"], lost["magnitude"])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep some of 2 removable heads and remove some, but sparsity 0.9 keeps 0"):
        describe(build_model("llama"), PruningConfig(pattern="heads", sparsity=0.9))
    with pytest.raises(UserError, match="of GPTNeoXForCausalLM has none"):
        describe(build_model("gpt_neox"), PruningConfig(pattern="heads"))
    with pytest.raises(UserError, match=r"ignore names .*k_proj"):
        describe(build_model("llama"), PruningConfig(pattern="heads", ignore=["layers.1.self_attn.k_proj"]))


@pytest.mark.parametrize(("name", "sparsity"), [("opt", 0.5), ("gpt2", 0.5), ("multi-head", 0.25)])
def test_heads_that_no_setting_says_are_refused_before_any_long_work(
    name: str, sparsity: float, tmp_path: Path
) -> None:
    """OPT and GPT-2 divide their width by the number of heads, and 64 does not divide by 3 heads, which LLaMA demands."""
    pruner = SparseLLMCallback(**{**HEADS, "sparsity": sparsity}, export_dir=str(tmp_path / "out"))
    model = MODELS[name]() if name in MODELS else build_model(name)
    with pytest.raises(UserError, match=r"configuration that can say that . of 4 heads of .. features are left"):
        trainer(pruner).fit(OwnModule(model), DataLoader(torch.zeros(8, 16, dtype=torch.long)))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
