"""One seed gives bit-equal weights, for any number of threads and for any batches of the same windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import VOCABULARY, build_model
from support.runs import assert_same_weights
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, prune_model

PLAIN: list[dict[str, Any]] = [
    {"method": "magnitude"},
    {"method": "wanda", "pattern": "2:4", "sparsity": None},
    {"method": "sparsegpt"},
    {"method": "admm"},
    {"method": "sparsellm", "target": "model", "local_solver": "admm", "num_iterations": 2},
    {"method": "sparsellm", "allocation": "owl", "num_iterations": 2},
]
TUNED: list[dict[str, Any]] = [
    {"preset": "fast"},
    {"preset": "balanced", "reconstruction_steps": 12, "distillation_steps": 4},
    {"preset": "best", "reconstruction_steps": 4, "distillation_steps": 4},
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pruned(name: str, settings: dict[str, Any], batch: int, threads: int = 1) -> PreTrainedModel:
    ids = torch.randint(1, VOCABULARY, (20, 48), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 30:] = mask[9, :7] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(batch), mask.split(batch), strict=True)]
    torch.set_num_threads(threads)
    torch.manual_seed(batch * threads)  # the global random state has no part in the result
    model = build_model(name)
    prune_model(model, batches, PruningConfig(**{"sparsity": 0.6, "num_calibration_samples": 20, **settings}))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", PLAIN, ids=lambda settings: settings["method"])
def test_solvers(name: str, settings: dict[str, Any]) -> None:
    expected = pruned(name, {"preset": "paper", **settings}, batch=4)
    assert_same_weights(pruned(name, {"preset": "paper", **settings}, batch=5, threads=2), expected)


@pytest.mark.parametrize("settings", TUNED, ids=lambda settings: settings["preset"])
def test_reconstruction(settings: dict[str, Any]) -> None:
    """With the same number of threads: gradients are summed by thread."""
    expected = pruned("gpt2", settings, batch=4)
    for batch in (1, 20):
        assert_same_weights(pruned("gpt2", settings, batch), expected)
