"""Pattern neurons: which hidden units leave, what is left, and the smaller model that is exported."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import VOCABULARY, build_model
from support.training import OwnModule, exported_smaller, trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

from sparsellm_lightning import PruningConfig, SparseLLMCallback, UserError, perplexity, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.data import TextDataModule

NEURONS: dict[str, Any] = {"pattern": "neurons", "sparsity": 0.5, "round_to": 16, "num_calibration_samples": 8}


def prune(model: PreTrainedModel, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune_model(model, random_batches(), PruningConfig(**{**NEURONS, "preset": "paper", **settings}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gemma3", "gpt_neox", "opt-350m"])
def test_units_that_leave_are_zero_in_every_matrix(name: str) -> None:
    dense, model = build_model(name), build_model(name)
    report = prune(model)
    for block, before in zip(describe(model).blocks, describe(dense).blocks, strict=True):
        (network,) = block.networks
        left = network.roles["down"].matrix.any(0)
        assert int(left.sum()) == len(left) // 2
        for p in network.first:
            assert torch.equal(p.matrix.any(1), left)
        others, untouched = (
            [p for unit in b.units if unit is not b.networks[0] for p in unit.projections] for b in (block, before)
        )
        for p, q in zip(others, untouched, strict=True):
            assert torch.equal(p.matrix, q.matrix)
    errors = report.blocks[0]["errors"]
    assert errors[-1] < errors[0] < 1


@pytest.mark.parametrize("preset", ["fast", "balanced", pytest.param("best", marks=pytest.mark.slow)])
def test_presets(preset: str) -> None:
    model = build_model("llama")
    prune(model, preset=preset)
    for network in describe(model).networks:
        assert int(network.roles["down"].matrix.any(0).sum()) == 64


@pytest.mark.parametrize(
    ("name", "finetune"), [("llama", False), ("opt", False), ("gemma3", False), ("phi3", True), ("gpt2", True)]
)
def test_the_export_is_smaller_and_gives_the_same_logits(name: str, finetune: bool, tmp_path: Path) -> None:
    model = build_model(name)
    smaller, report = exported_smaller(model, tmp_path / "out", finetune, **NEURONS, preset="paper")
    for network, full in zip(describe(smaller).networks, describe(model).networks, strict=True):
        assert network.roles["down"].shape[1] == full.roles["down"].shape[1] // 2
    assert report["sparsity"]["achieved"] > 0.2
    assert "sparsity_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # What is left is a model like any other.
    again = prune(smaller, pattern="2:4", sparsity=None, round_to=64)
    assert again.sparsity["achieved"] == 0.5


def test_trained_model(trained: Callable[[str], PreTrainedModel], text: TextDataModule) -> None:
    """Half of the units: the surgeon loses less than Wanda's score and than magnitude, and the alternation less still."""
    dense, lost = perplexity(trained("llama"), text.val_dataloader()), {}
    for method in ("sparsellm", "sparsegpt", "wanda", "magnitude"):
        model = trained("llama")
        config = PruningConfig(**{**NEURONS, "num_calibration_samples": 128}, preset="paper", method=method)
        prune_model(model, text.train_dataloader(), config)
        lost[method] = math.log(perplexity(model, text.val_dataloader()) / dense)
    assert 0 < lost["sparsellm"] < lost["sparsegpt"] < 0.8 * lost["wanda"] < 0.8 * lost["magnitude"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="experts"):
        describe(build_model("mixtral"), PruningConfig(pattern="neurons"))
    with pytest.raises(UserError, match=r"128 hidden units.*keep 0.*round_to"):
        describe(build_model("llama"), PruningConfig(pattern="neurons", sparsity=0.9))
    with pytest.raises(UserError, match=r"ignore names .*down_proj"):
        describe(build_model("llama"), PruningConfig(pattern="neurons", ignore=["layers.1.mlp.down_proj"]))
    with pytest.raises(UserError, match="allocation kl needs pattern unstructured"):
        PruningConfig(pattern="neurons", allocation="kl")
    with pytest.raises(UserError, match="round_to must be an integer of at least 1"):
        PruningConfig(pattern="neurons", round_to=0)


def test_a_width_that_no_setting_says_is_refused_before_any_long_work(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4))
    pruner = SparseLLMCallback(**NEURONS, export_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="256 is fixed in its code"):
        trainer(pruner).fit(OwnModule(model), DataLoader(torch.zeros(8, 16, dtype=torch.long)))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_nothing_is_removed_at_sparsity_0() -> None:
    model = build_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, sparsity=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_zeros_that_a_pattern_fills() -> None:
    model, batches = build_model("llama"), random_batches()
    settings: dict[str, Any] = {"preset": "paper", "method": "sparsegpt", "num_calibration_samples": 8}
    prune_model(model, batches, PruningConfig(**settings, sparsity=0.7))
    removing = PruningConfig(**settings, pattern="neurons", sparsity=0.5)
    with pytest.raises(UserError, match="Remove parts first"):
        prune_model(model, batches, removing, keep_zeros=True)
    with pytest.warns(UserWarning, match="may fill the zeros"):
        prune_model(model, batches, removing)
