"""Attention is computed once a block where it can be, and never from another block's inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import build_model
from support.runs import LAYOUTS

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.architecture import describe, examination


def pruned(name: str, replays: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[dict[str, Any], int]:
    """The pruned weights, and the number of calls of the first block's first attention projection."""
    model = build_model(name)
    if not replays:
        monkeypatch.setattr(examination.Examination, "_replay", lambda self, units: None)
    calls = []
    next(describe(model).blocks[0].projections()).module.register_forward_hook(lambda *_: calls.append(1))
    prune_model(model, random_batches(), PruningConfig(sparsity=0.6, num_calibration_samples=8, **settings))
    return model.state_dict(), len(calls)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_replayed_attention_gives_the_same_weights(name: str, preset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_replay, few = pruned(name, True, monkeypatch, preset=preset)
    without, many = pruned(name, False, monkeypatch, preset=preset)
    assert all(torch.equal(weight, without[key]) for key, weight in with_replay.items())
    assert few < many, "queries are computed less often"


@pytest.mark.parametrize("ignore", [["*.0.mlp.*"], ["*.0.mlp.*", "*.1.self_attn.o_proj"], ["*.self_attn.q_proj"]])
def test_attention_is_not_replayed_from_another_block(ignore: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"preset": "paper", "method": "sparsegpt", "ignore": ignore}
    with_replay, _ = pruned("llama", True, monkeypatch, **settings)
    without, _ = pruned("llama", False, monkeypatch, **settings)
    assert all(torch.equal(weight, without[key]) for key, weight in with_replay.items())
