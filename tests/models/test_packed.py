"""Files without the zeros: the format, read by plain NumPy here, and models that are loaded from it."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import VOCABULARY, build_model
from support.training import OwnModule, trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from sparsellm_lightning import SparseLLMCallback, UserError, load_model
from sparsellm_lightning.models import verify_export
from sparsellm_lightning.models.packed import pack_folder, pack_tensor, unpack_tensor


def sparse(shape: tuple[int, ...], share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= share)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (7, 5), (2, 3, 11), (64, 64)])
def test_what_is_packed_is_unpacked(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = sparse(shape, 0.6, dtype)
    found = pack_tensor(tensor)
    assert found is not None
    bits, kept = found
    entries = tensor.flatten().tolist()
    assert [bool(bits[i // 8] >> (i % 8) & 1) for i in range(len(entries))] == [entry != 0 for entry in entries]
    assert kept.tolist() == [entry for entry in entries if entry]
    assert torch.equal(unpack_tensor(bits, kept, shape), tensor)


def test_dense_tensors_are_not_packed() -> None:
    assert pack_tensor(torch.ones(64, 64)) is None
    assert pack_tensor(torch.zeros(64, 64)) is not None


def test_parts_that_do_not_belong_together() -> None:
    found = pack_tensor(sparse((8, 8), 0.5))
    assert found is not None
    bits, kept = found
    with pytest.raises(ValueError, match=r"the bits keep \d+ entries, but there are"):
        unpack_tensor(bits, kept[:-1], (8, 8))
    with pytest.raises(ValueError, match="128 entries need 16 bytes of bits, got 8"):
        unpack_tensor(bits, kept, (8, 16))


def exported(folder: Path, name: str, **settings: Any) -> Any:
    given = {"preset": "paper", "method": "magnitude", "num_calibration_samples": 8, "measure": False, **settings}
    pruner = SparseLLMCallback(**given, export_dir=str(folder))
    model = build_model(name)
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(pruner, max_steps=1).fit(OwnModule(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("name", "pattern", "share"),
    [("llama", "unstructured", 0.7), ("gpt2", "2:4", 0.5), ("mixtral", "unstructured", 0.6), ("phi3", "neurons", 0.5)],
)
def test_an_export_is_loaded_as_it_was(name: str, pattern: str, share: float, tmp_path: Path) -> None:
    """Tied heads (GPT-2) and experts, which transformers stores in another form, too."""
    model = exported(tmp_path / "out", name, pattern=pattern, sparsity=share, pack=True)
    assert not list((tmp_path / "out").glob("model*"))
    loaded = load_model(str(tmp_path / "out")).eval()
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert verify_export(tmp_path / "out") == []
    sizes = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["files_bytes"]
    assert sizes["packed"] == (tmp_path / "out" / "packed.safetensors").stat().st_size
    assert sizes["packed"] < (1.01 if pattern == "neurons" else 0.8) * sizes["plain"]


def test_file_has_the_documented_size_and_plain_numpy_reads_it(tmp_path: Path) -> None:
    plain = {"a.weight": sparse((48, 32), 0.7), "norm": torch.ones(32)}
    save_file(plain, tmp_path / "model.safetensors")
    sizes = pack_folder(tmp_path)
    with safe_open(tmp_path / "packed.safetensors", "np") as file:
        assert sorted(file.keys()) == ["a.weight.bits", "a.weight.kept", "norm"]
        shape = json.loads(file.metadata()["shapes"])["a.weight"]
        mask = np.unpackbits(file.get_tensor("a.weight.bits"), bitorder="little")[: math.prod(shape)].astype(bool)
        found = np.zeros(math.prod(shape), dtype=np.float32)
        found[mask] = file.get_tensor("a.weight.kept")
    assert np.array_equal(found.reshape(shape), plain["a.weight"].numpy())
    kept = int(plain["a.weight"].count_nonzero())
    assert sizes["packed"] is not None
    assert sizes["packed"] < 48 * 32 // 8 + 4 * kept + 4 * 32 + 600  # and a header


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    exported(tmp_path / "out", "llama", sparsity=0.5, pack=True)
    assert "`sparsellm_lightning.load_model(DIR)` reads them" in (tmp_path / "out" / "README.md").read_text()
    file = tmp_path / "out" / "packed.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    name = next(key for key in state if key.endswith(".kept"))
    save_file({**state, name: state[name][:-1].clone()}, file, metadata)
    with pytest.raises(UserError, match=r"packed\.safetensors: .*the bits keep"):
        load_model(str(tmp_path / "out"))
    assert any("the bits keep" in found for found in verify_export(tmp_path / "out"))
    del state[name]
    save_file(state, file, metadata)
    with pytest.raises(UserError, match=r"packed\.safetensors: lacks "):
        load_model(str(tmp_path / "out"))


def test_plain_exports_stay_plain(tmp_path: Path) -> None:
    exported(tmp_path / "out", "llama", sparsity=0.5)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
