"""Checkpoints that are not whole are refused: transformers would initialise the missing weights at random."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sparsellm_lightning import UserError, load_model


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_missing_weight_is_an_error(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(copied))


def test_a_weight_of_another_shape_is_an_error(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:-1].contiguous()
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="must be a causal language model that transformers can load"):
        load_model(str(copied))


def test_truncated_weights_are_an_error(copied: Path) -> None:
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="must be a causal language model that transformers can load"):
        load_model(str(copied))
