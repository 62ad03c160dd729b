"""What works for LLaMA works for models of other structure: everything at once, and adapters on every linear layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.classes import tiny_model
from support.classes_pruned import batches, logits_of, pruned, zeros_wanted
from support.training import trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm_lightning import LoraOptions, PruningConfig, SparseFinetuning, UserError, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.sparsity import add_adapters, merged_state

pytestmark = pytest.mark.filterwarnings("ignore")

# Fused matrices, parallel parts, norms behind, experts of several kinds, linear attention, states, low-rank projections.
TYPES = [
    "dbrx",
    "llama4",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("phi3", "falcon", "olmo2", "gpt_oss", "deepseek_v3", "qwen3_next", "bamba", "mamba2", "minicpm3")
    ),
]


@pytest.mark.parametrize("model_type", TYPES)
def test_everything_at_once(model_type: str, tmp_path: Path) -> None:
    """ADMM, uneven allocation, written windows, reconstruction, distillation, a journal; then an export."""
    model = tiny_model(model_type)
    config = PruningConfig(
        preset="best",
        sparsity=0.5,
        num_calibration_samples=8,
        reconstruction_steps=2,
        continuations=1,
        distillation_steps=2,
    )
    report = prune_model(model, batches(), config, resume_dir=tmp_path / "journal")
    assert report.sparsity["achieved"] == pytest.approx(_share_of_pruned(model) * 0.5, abs=5e-3)
    assert report.distillation is not None
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    before = logits_of(model)
    assert torch.isfinite(before).all()
    torch.testing.assert_close(logits_of(reloaded), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize("model_type", [name for name in TYPES if "mamba2" not in str(name)])
def test_adapters(model_type: str) -> None:
    """Training adapters keeps every zero, and the merged model has the logits of the trained one."""
    pytest.importorskip("peft")
    plain = pruned(tiny_model(model_type), sparsity=0.5, method="wanda")
    model = copy.deepcopy(plain)
    add_adapters(model, LoraOptions(rank=2))
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    trainer(SparseFinetuning(), max_steps=3).fit(_Module(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    trained = [bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name]
    assert sum(trained) > 0.8 * len(trained), "B starts at zero; only experts without tokens stay there"
    plain.load_state_dict(merged_state(model, model.state_dict()))
    expected = logits_of(model.eval())
    torch.testing.assert_close(logits_of(plain), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for p in describe(plain).projections():
        assert int((p.matrix == 0).sum()) == zeros_wanted(p.shape, p.parts), p.name


def test_adapters_that_a_kernel_would_pass_by() -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="incompatible with Mamba"):
        add_adapters(tiny_model("mamba2"), LoraOptions())


class _Module(pl.LightningModule):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def _share_of_pruned(model: PreTrainedModel) -> float:
    projections = list(describe(model).projections())
    return sum(p.size for p in projections if p.pruned) / sum(p.size for p in projections)


def test_trained_adapters_are_refused() -> None:
    """The solvers would not see what they do."""
    model = tiny_model("llama")
    add_adapters(model, LoraOptions(rank=2))
    prune_model(model, batches(), PruningConfig(preset="paper", method="wanda", num_calibration_samples=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    with pytest.raises(UserError, match=r"adapters must do nothing yet, but that of .*q_proj changes"):
        prune_model(model, batches(), PruningConfig(preset="paper", num_calibration_samples=4))


@pytest.mark.parametrize("model_type", ["cpmant", "prophetnet"])
def test_presets_where_hidden_states_are_of_more_than_the_tokens(model_type: str) -> None:
    """Learned prompts, or several streams: their hidden states do not give next-token distributions."""
    model = tiny_model(model_type)
    config = PruningConfig(
        preset="best", sparsity=0.5, num_calibration_samples=8, reconstruction_steps=2, distillation_steps=128
    )
    report = prune_model(model, batches(), config)
    assert report.sparsity["achieved"] == pytest.approx(0.5, abs=0.01)
    assert report.distillation is None
