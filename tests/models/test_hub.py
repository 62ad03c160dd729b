"""Uploads, with a hub that the tests imitate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import VOCABULARY, build_model
from support.training import OwnModule, trainer
from torch.utils.data import DataLoader

from sparsellm_lightning import SparseLLMCallback, UserError
from sparsellm_lightning.models import hub


class Hub:
    """Notes what is uploaded. ``refusal``: an error that it raises."""

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.uploads: dict[str, list[str]] = {}
        self.refusal: Exception | None = None

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        full = repo if "/" in repo else f"me/{repo}"
        self.repos[full] = private
        return SimpleNamespace(repo_id=full)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.uploads[repo_id] = sorted(path.name for path in folder_path.iterdir())
        return SimpleNamespace(commit_url="https://hub/commit")


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: found)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    return found


def prune(folder: Path, repo: str, **settings: Any) -> None:
    pruner = SparseLLMCallback(
        sparsity=0.5,
        preset="paper",
        method="magnitude",
        num_calibration_samples=4,
        measure=False,
        push_to_hub=repo,
        **settings,
    )
    ids = torch.arange(64).view(4, 16) % VOCABULARY
    trainer(pruner, max_steps=1, default_root_dir=folder).fit(
        OwnModule(build_model("llama")), DataLoader(ids, batch_size=4)
    )  # type: ignore[arg-type]


def test_the_whole_folder_goes_up(imitated: Hub, tmp_path: Path) -> None:
    prune(tmp_path, "me/model-50", export_dir=str(tmp_path / "out"))
    assert imitated.repos == {"me/model-50": True}
    assert imitated.uploads == {"me/model-50": sorted(path.name for path in (tmp_path / "out").iterdir())}
    assert {"config.json", "model.safetensors", "README.md"} <= set(imitated.uploads["me/model-50"])


def test_a_refusal_leaves_the_folder(imitated: Hub, tmp_path: Path) -> None:
    imitated.refusal = OSError("no quota")
    with pytest.raises(UserError, match=r"no quota.*hf upload me/model-50"):
        prune(tmp_path, "me/model-50", export_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("get_token", lambda: None, "hf auth login"), ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set")],
)
def test_refused_before_any_work(
    imitated: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(hub, name, value)
    with pytest.raises(UserError, match=message):
        prune(tmp_path, "me/model-50", export_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unusable_names(imitated: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be the id of a repository"):
        prune(tmp_path, "no such/id/at all", export_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="export_dir is not set"):
        prune(tmp_path, "me/model-50")


def test_a_name_without_a_user_is_the_users(imitated: Hub, tmp_path: Path) -> None:
    prune(tmp_path, "model-50", export_dir=str(tmp_path / "out"))
    assert imitated.uploads.keys() == {"me/model-50"}
