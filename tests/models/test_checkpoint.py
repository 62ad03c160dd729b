"""Sharded checkpoints are read without executing code from them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import build_model
from support.pickles import MakesFolder

from sparsellm_lightning import UserError
from sparsellm_lightning.models.checkpoint import check_checkpoint, is_checkpoint, load_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in build_model("llama").state_dict().items()}
    dcp.save({"state_dict": state, "loops": {"epoch": 3}}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    return tmp_path / "sharded"


@pytest.mark.parametrize("home", [False, True])
def test_weights_are_read(checkpoint: Path, home: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    path = "~/sharded" if home else str(checkpoint)
    assert is_checkpoint(path)
    model, wanted = build_model("llama", seed=1), build_model("llama").state_dict()
    load_checkpoint(model, path, "model.")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_code_in_the_metadata_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(MakesFolder(tmp_path / "hacked")))
    with pytest.raises(UserError, match="mkdir, which may execute code"):
        load_checkpoint(build_model("llama"), str(checkpoint), "model.")
    assert not (tmp_path / "hacked").exists()


def test_code_in_an_entry_does_not_run(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in build_model("llama").state_dict().items()}
    entries = {"state_dict": {**state, "model.more": MakesFolder(tmp_path / "hacked")}}
    dcp.save(entries, checkpoint_id=tmp_path / "sharded", no_dist=True)
    with pytest.raises(UserError, match="weights must be a checkpoint"):
        load_checkpoint(build_model("llama"), str(tmp_path / "sharded"), "model.")
    assert not (tmp_path / "hacked").exists()


def test_files_outside_the_folder_are_not_read(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../{checkpoint.name}/{stored.relative_path}"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="outside the folder"):
        load_checkpoint(build_model("llama"), str(checkpoint), "model.")


@pytest.mark.parametrize("content", [None, b"", b"half"])
def test_a_sharded_checkpoint_that_was_not_finished_is_refused(checkpoint: Path, content: bytes | None) -> None:
    """Lightning writes meta.pt last."""
    torch.save({"pytorch-lightning_version": "2.6"}, checkpoint / "meta.pt")
    check_checkpoint(str(checkpoint))
    (checkpoint / "meta.pt").unlink() if content is None else (checkpoint / "meta.pt").write_bytes(content)
    with pytest.raises(UserError, match="ckpt_path must be a checkpoint of Lightning"):
        check_checkpoint(str(checkpoint))


@pytest.mark.parametrize("length", [0, 1, 100])
def test_truncated_metadata_is_refused(checkpoint: Path, length: int) -> None:
    (checkpoint / ".metadata").write_bytes((checkpoint / ".metadata").read_bytes()[:length])
    with pytest.raises(UserError, match="weights must be a checkpoint"):
        load_checkpoint(build_model("llama"), str(checkpoint), "model.")
