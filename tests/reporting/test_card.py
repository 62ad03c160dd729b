"""The model card says what the report says, and its settings give the same configuration again."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.batches import random_batches
from support.models import VOCABULARY, build_model
from support.training import OwnModule, trainer
from torch.utils.data import DataLoader

from sparsellm_lightning import PruningConfig, SparseLLMCallback, prune_model
from sparsellm_lightning.reporting.card import model_card


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.6, "preset": "fast"},
        {"pattern": "2:4", "preset": "paper", "method": "wanda", "ignore": ["down_proj"]},
        {"pattern": {"neurons": 0.25, "blocks": 1}, "preset": "paper", "round_to": 16, "damping": 0.05},
    ],
)
def test_card(settings: dict[str, Any]) -> None:
    config = PruningConfig(**settings, num_calibration_samples=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_model(build_model("llama"), random_batches(), config)
    report.perplexity = {"dense": 10.0, "pruned": 20.0}
    report.data, report.examples = {"train_files": "текст-😀.txt"}, [{"prompt": "Привет", "dense": "мир"}]
    card = model_card(report, ["layers.png"])
    assert "| pruned | 20.00 | 0.693 |" in card
    assert "| dense | 10.00 |  |" in card
    weights = sum(math.prod(layer["shape"]) for layer in report.layers)
    assert f"| all decoder blocks | {weights:,} | {100 * report.sparsity['achieved']:.2f} % |" in card
    assert "![layers.png](layers.png)" in card
    assert f"{report.calibration['tokens']:,} tokens" in card
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block is not None
    assert PruningConfig(**yaml.safe_load(block[1])["pruner"]) == config
    assert yaml.safe_load(block[1])["data"] == report.data
    assert '- *"Привет"*\n  - dense: "мир"' in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_text_of_models_is_no_markdown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_model(build_model("llama"), random_batches(), PruningConfig(preset="paper", method="magnitude"))
    assert "base_model" not in model_card(report, [])
    report.model = "some/model"
    assert yaml.safe_load(model_card(report, []).split("---")[1])["base_model"] == "some/model"
    report.examples = [{"prompt": "<s> 2 * 3 * `x`", "dense": "[a](b) & c"}]
    card = model_card(report, [])
    assert r'- *"\<s\> 2 \* 3 \* \`x\`"*' in card
    assert r'- dense: "\[a\](b) \& c"' in card


def test_an_export_has_its_card(tmp_path: Path) -> None:
    pruner = SparseLLMCallback(
        sparsity=0.5, preset="paper", num_calibration_samples=4, export_dir=str(tmp_path / "out"), measure=False
    )
    ids = [[index % VOCABULARY for index in range(row, row + 16)] for row in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(pruner, max_steps=1).fit(OwnModule(build_model("llama")), DataLoader(torch.tensor(ids), batch_size=4))  # type: ignore[arg-type]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50.00 % zeros" in card
    assert "at dense speed" in card
    assert "perplexity" not in card.partition("## Sparsity")[0]
