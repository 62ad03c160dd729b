"""Damaged, incomplete, foreign and malicious model files end with one line, and never with random or partial weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pickles import MakesFolder

from sparsellm_lightning import UserError, load_model, load_tokenizer


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def refused(path: Path) -> Any:
    """Expects an error of one line that names the path."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{re.escape(str(path))}[^\n]*\Z")


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
    with pytest.raises(UserError, match="transformers must be able to load"):
        load_model(str(copied))


def test_truncated_weights_are_an_error(copied: Path) -> None:
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="transformers must be able to load"):
        load_model(str(copied))


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"\xff" * 4000, b"not a model", b'{"a": 1}'], ids=range(5))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_of_nonsense(copied: Path, name: str, content: bytes) -> None:
    (copied / name).write_bytes(content)
    with refused(copied):
        load_model(str(copied))


@pytest.mark.parametrize("content", [b"", b"not a tokenizer", b"[]", b'{"model": {"type": "BPE"}}'], ids=range(4))
def test_tokenizers_of_nonsense(copied: Path, content: bytes) -> None:
    (copied / "tokenizer.json").write_bytes(content)
    with refused(copied):
        load_tokenizer(str(copied))


def test_weights_of_another_model(copied: Path, folder_of: Callable[[str], str]) -> None:
    shutil.copy(Path(folder_of("gpt2")) / "model.safetensors", copied / "model.safetensors")
    with pytest.raises(UserError, match="lacks"):
        load_model(str(copied))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 96),
        ("num_hidden_layers", 5),
        ("hidden_act", "nonsense"),
        ("model_type", "nonsense"),
        ("vocab_size", 0),
    ],
)
def test_configurations_of_another_model(copied: Path, key: str, value: Any) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {key: value}))
    with refused(copied):
        load_model(str(copied))


@pytest.mark.parametrize("kind", ["pickle of a model", "Lightning checkpoint"])
def test_code_in_a_pickle_does_not_run(copied: Path, tmp_path: Path, kind: str) -> None:
    state = {**load_file(copied / "model.safetensors"), "more": MakesFolder(tmp_path / "hacked")}
    if kind == "pickle of a model":
        (copied / "model.safetensors").unlink()
        torch.save(state, copied / "pytorch_model.bin")
        with refused(copied):
            load_model(str(copied))
    else:
        from sparsellm_lightning.models.checkpoint import load_checkpoint

        model = load_model(str(copied))
        torch.save({"state_dict": state}, tmp_path / "last.ckpt")
        with refused(tmp_path / "last.ckpt"):
            load_checkpoint(model, str(tmp_path / "last.ckpt"), "")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF" + b"\xff" * 200, b"GGUF\x03\x00\x00\x00" + b"\x00" * 16, b"JUNK" * 99]
)
def test_gguf_files_of_nonsense(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    for load in (load_model, load_tokenizer):
        with refused(tmp_path / "model.gguf"):
            load(str(tmp_path / "model.gguf"))
