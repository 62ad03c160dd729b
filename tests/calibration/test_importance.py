"""The importance of features, against gradients of the whole model; and what it is good for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import build_model
from support.ranks import on_ranks
from support.runs import calibration_batches, make_context
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig
from sparsellm_lightning.architecture import describe, hidden_states
from sparsellm_lightning.calibration import capture, feature_importance, importance
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.solvers import SINGLE, Ranks

CONFIG = PruningConfig(preset="fast", solver_precision="float32", seed=3)


def measured(model: PreTrainedModel, ranks: Ranks = SINGLE) -> dict[int, Tensor]:
    context = make_context(model, CONFIG, ranks)
    batches = calibration_batches(random_batches())[ranks.rank :: ranks.size]
    with context.adapter.calibrating(model), torch.no_grad():
        return feature_importance(context, capture(context, batches, 8))


@pytest.mark.parametrize(
    ("name", "positions"),  # whose logits are in memory at once
    [
        *((name, 7) for name in ("llama", "gemma2", "gemma3", "opt", "gpt2", "mixtral", "phi3")),
        *((name, 1000) for name in ("llama", "gemma2")),
    ],
)
def test_gradients_of_the_whole_model(name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "POSITIONS", positions)
    model = build_model(name).eval()
    blocks = describe(model).blocks
    sums = [torch.zeros(()) for _ in blocks]
    for batch in random_batches():
        seen: list[Tensor] = []

        def keep(module: torch.nn.Module, args: object, output: object, seen: list[Tensor] = seen) -> None:
            seen.append(hidden_states(output))
            seen[-1].retain_grad()

        hooks = [block.module.register_forward_hook(keep) for block in blocks]
        logits = model(**batch, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        uniform = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(CONFIG.seed))
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(logits.shape[:2]).bool()
        total = torch.zeros(())
        for row, position in valid.nonzero().tolist():
            q = torch.softmax(logits[row, position], -1)
            token = next((v for v, below in enumerate(q.cumsum(0)) if below >= uniform[position]), len(q) - 1)
            total = total + torch.log(q[token])
        model.zero_grad()
        total.backward()
        for index, hidden in enumerate(seen):
            assert hidden.grad is not None
            sums[index] = sums[index] + hidden.grad[valid].square().sum(0)
    model.zero_grad()
    found = measured(model)
    for index, expected in enumerate(sums):
        torch.testing.assert_close(found[index], expected / expected.mean(), rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_agree() -> None:
    alone = measured(build_model("llama"))
    models = [build_model("llama") for _ in range(2)]  # not in the threads, which share a random generator
    for together in on_ranks(2, lambda ranks: measured(models[ranks.rank], ranks)):
        for index, expected in alone.items():
            torch.testing.assert_close(together[index], expected, rtol=1e-3, atol=1e-3)


def test_a_model_without_a_head_has_none() -> None:
    model = build_model("llama").model
    assert measured(model) == {}


def test_ranks_call_a_collective_head_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose windows are shorter calls it more often than it needs to, without another result."""
    monkeypatch.setattr(importance, "POSITIONS", 4)
    calls, tail_logits = [], importance.tail_logits

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return tail_logits(*args)

    monkeypatch.setattr(importance, "tail_logits", counted)
    model = build_model("llama")
    expected = measured(model)
    alone = len(calls)
    monkeypatch.setattr(StrategyAdapter, "forward_is_collective", True)
    monkeypatch.setattr(type(SINGLE), "largest", lambda self, count: max(count, 9))
    found = measured(model)
    assert len(calls) - alone > alone
    assert (len(calls) - alone) % 9 == 0
    for index, values in expected.items():
        torch.testing.assert_close(found[index], values)
