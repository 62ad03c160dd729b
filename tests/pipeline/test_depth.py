"""Pattern blocks: which decoder blocks leave, how the others make up for them, and the smaller model that is exported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import build_model
from support.runs import block_outputs, calibration_batches, make_context
from support.training import exported_smaller
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, UserError, perplexity, prune_model
from sparsellm_lightning.allocation import choose_blocks
from sparsellm_lightning.allocation.divergence import OutputProbe
from sparsellm_lightning.architecture import Block, describe
from sparsellm_lightning.calibration import capture
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.pipeline import sequential
from sparsellm_lightning.pipeline.tune import Reconstructor

BLOCKS: dict[str, Any] = {"pattern": "blocks", "sparsity": 0.3, "num_calibration_samples": 8}


def removed_from(model: PreTrainedModel) -> list[int]:
    return [block.index for block in describe(model).blocks if not any(p.matrix.any() for p in block.projections())]


def without(model: PreTrainedModel, indices: set[int]) -> PreTrainedModel:
    """The model with those blocks passing hidden states through, by plain modules."""

    class Through(nn.Module):
        def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden

    for index in indices:
        model.model.layers[index] = Through()
    return model


def test_greedy_choice() -> None:
    """The block without which the next-token distribution diverges least leaves first, then the next, by plain forwards."""
    batches = random_batches()
    context = make_context(build_model("gemma3"), PruningConfig(**{**BLOCKS, "sparsity": 0.45}))
    windows = calibration_batches(batches)
    with torch.no_grad():
        cache = capture(context, windows, 8)
        found = choose_blocks(context, cache, windows, number=3)

        def log_probabilities(model: PreTrainedModel) -> Tensor:
            # The probe looks at every token of these few windows that counts.
            return torch.cat([model(**b).logits.log_softmax(-1)[b["attention_mask"].bool()] for b in batches])

        dense = log_probabilities(build_model("gemma3"))
        expected: set[int] = set()
        for _ in range(3):
            divergences = {
                index: float(
                    (
                        dense.exp() * (dense - log_probabilities(without(build_model("gemma3"), {*expected, index})))
                    ).sum()
                )
                for index in range(7)
                if index not in expected
            }
            expected.add(min(divergences, key=lambda index: divergences[index]))
    assert set(found) == expected
    assert list(found.values()) == sorted(found.values())


@pytest.mark.parametrize(
    ("name", "finetune"),
    [(name, False) for name in ("llama", "opt", "gemma3", "phi3", "gpt_neox")] + [("gpt2", True), ("mixtral", True)],
)
def test_the_export_is_smaller_and_gives_the_same_logits(name: str, finetune: bool, tmp_path: Path) -> None:
    model, dense = build_model(name), build_model(name)
    smaller, report = exported_smaller(
        model, tmp_path / "out", finetune, **BLOCKS, reconstruction_steps=4, distillation_steps=2
    )
    gone = removed_from(model)
    blocks = len(describe(dense).blocks)
    assert len(gone) == round(0.3 * blocks)
    assert len(describe(smaller).blocks) == smaller.config.num_hidden_layers == blocks - len(gone)
    assert report["sparsity"]["achieved"] == pytest.approx(len(gone) / blocks)


def test_a_block_without_which_the_model_overflows_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = OutputProbe.divergence

    def overflowing(probe: OutputProbe, block: Block, without: Any = ()) -> float:
        return math.nan if 0 in without else divergence(probe, block, without)

    monkeypatch.setattr(OutputProbe, "divergence", overflowing)
    context = make_context(build_model("llama"), PruningConfig(**BLOCKS))
    windows = calibration_batches(random_batches())
    with torch.no_grad():
        found = choose_blocks(context, capture(context, windows, 8), windows, number=2)
    assert set(found) == {1, 2}


def test_blocks_before_the_first_that_leaves_stay_as_they_are() -> None:
    model, dense = build_model("gemma3"), build_model("gemma3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_model(
            model, random_batches(), PruningConfig(**BLOCKS, reconstruction_steps=4, distillation_steps=0)
        )
    gone = removed_from(model)
    for block, before in zip(describe(model).blocks, describe(dense).blocks, strict=True):
        changed = any(
            not torch.equal(p, q) for p, q in zip(block.module.parameters(), before.module.parameters(), strict=True)
        )
        tuned = report.blocks[block.index]["reconstruction"] is not None
        assert tuned == (block.index >= gone[0] - 1 and block.index not in gone)
        assert changed <= (tuned or block.index in gone)


def test_the_block_before_those_that_leave_gives_what_they_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its goal, and the importance of features there, are behind the last one."""
    model, dense = build_model("gemma3"), build_model("gemma3")
    importance = {index: torch.full((64,), index + 1.0) for index in range(7)}
    seen: dict[int, tuple[list[Tensor], Tensor | None]] = {}

    def reconstructor(context: Any, block: Block, cache: Any, goal: list[Tensor], weights: Tensor | None) -> Any:
        seen[block.index] = [tensor.clone() for tensor in goal], weights
        return Reconstructor(context, block, cache, goal, weights)

    monkeypatch.setattr(sequential, "feature_importance", lambda context, cache: importance)
    monkeypatch.setattr(sequential, "Reconstructor", reconstructor)
    batches = random_batches(8, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {**BLOCKS, "sparsity": 0.45, "calibration_val_fraction": 0.0, "solver_precision": "float32"}
        prune_model(model, batches, PruningConfig(**settings, reconstruction_steps=4, distillation_steps=0))
    gone = removed_from(model)
    last = next(index for index in gone if index + 1 not in gone)
    goal, weights = seen[gone[0] - 1]
    wanted = torch.cat(block_outputs(dense, dense.model.layers[last], batches))
    torch.testing.assert_close(torch.cat(goal), wanted, rtol=1e-4, atol=1e-4)
    assert weights is importance[last]


@pytest.mark.slow
def test_trained_model(trained: Callable[[str], PreTrainedModel], text: TextDataModule) -> None:
    """One of three blocks: tuning the others makes up for half of the loss."""
    dense, lost = perplexity(trained("llama"), text.val_dataloader()), {}
    for steps in (0, 96):
        model = trained("llama")
        steps_of = {"reconstruction_steps": steps, "distillation_steps": 0}
        settings: dict[str, Any] = {**BLOCKS, "num_calibration_samples": 128, **steps_of}
        prune_model(model, text.train_dataloader(), PruningConfig(**settings))
        lost[steps] = math.log(perplexity(model, text.val_dataloader()) / dense)
    assert 0 < lost[96] < 0.6 * lost[0]  # half, measured


def test_refusals() -> None:
    with pytest.raises(UserError, match="Pattern blocks must keep some of 3 blocks"):
        describe(build_model("llama"), PruningConfig(pattern="blocks", sparsity=0.9))
    with pytest.raises(UserError, match="a norm behind the sum"):
        prune_model(build_model("opt-350m"), random_batches(), PruningConfig(**BLOCKS))
