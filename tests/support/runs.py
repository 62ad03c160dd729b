"""Runs of the pipeline below ``prune_model``: from windows to blocks, without a Trainer and without a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig
from sparsellm_lightning.architecture import Projection, describe
from sparsellm_lightning.calibration import ActivationCache, Context
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.pipeline import prune, sequential, tune
from sparsellm_lightning.reporting import BlockResult
from sparsellm_lightning.solvers import SINGLE, Ranks

LAYOUTS = ["llama", "gemma3", "opt", "opt-350m", "gpt2", "gpt_neox"]
"""Models of ``support.models.CONFIGS`` whose blocks differ in layout. The others repeat one of these."""


def make_context(model: PreTrainedModel, config: PruningConfig, ranks: Ranks = SINGLE) -> Context:
    adapter = StrategyAdapter()
    adapter.ranks = ranks
    return Context(describe(model, config), config, adapter)


def calibration_batches(batches: Sequence[dict[str, Tensor]]) -> list[CalibrationBatch]:
    """The batches, in which tokens that ``attention_mask`` excludes do not count."""
    return [
        CalibrationBatch(batch, batch["attention_mask"].bool() if "attention_mask" in batch else None)
        for batch in batches
    ]


def prune_blocks(
    context: Context, batches: Sequence[CalibrationBatch], fitted: int | None = None
) -> tuple[list[BlockResult], ActivationCache]:
    """Prune all blocks. The results, and the cache of activations: at the end it is in front of the last block.

    Args:
        context: of the run.
        batches: calibration windows.
        fitted: number of windows that are fitted. None: all.
    """
    caches: list[ActivationCache] = []
    capture = sequential.capture

    def capture_and_keep(*args: Any) -> ActivationCache:
        caches.append(capture(*args))
        return caches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "capture", capture_and_keep)
        windows = sum(batch.windows for batch in batches)
        results = list(sequential.prune_blocks(context, batches, windows if fitted is None else fitted))
    (cache,) = caches
    return results, cache


def tune_with(patch: pytest.MonkeyPatch, learning_rate: float | None = None, batch_tokens: int | None = None) -> None:
    """Have reconstruction use another learning rate, or other numbers of tokens in a step and in a batch."""
    options: dict[str, Any] = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    patch.setattr(sequential, "batches_of_interest", partial(tune.batches_of_interest, **options))
    if batch_tokens is not None:
        patch.setattr(prune, "STEP_TOKENS", batch_tokens)
    if learning_rate is not None:
        options["learning_rate"] = learning_rate
    patch.setattr(sequential, "Reconstructor", partial(tune.Reconstructor, **options))


def block_inputs(model: PreTrainedModel, block: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The hidden states in front of a block, by batch, as plain ``transformers`` computes them."""
    seen: list[Tensor] = []
    see = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with see, torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return seen


def block_outputs(model: PreTrainedModel, block: nn.Module, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The hidden states behind a block, by batch, as plain ``transformers`` computes them."""
    seen: list[Tensor] = []
    see = block.register_forward_hook(lambda _, args, output: seen.append(first_of(output)))
    with see, torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return seen


def first_of(output: Any) -> Tensor:
    """The hidden states of a block's output, which may be a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def zero_smaller_half(projections: Iterable[Projection]) -> None:
    """Prune half of each projection by magnitude."""
    for p in projections:
        small = p.parameter.detach().abs().flatten().float().kthvalue(p.parameter.numel() // 2).values
        p.parameter.data.masked_fill_(p.parameter.abs() <= small, 0)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """All parameters are bit-equal."""
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def assert_same_hidden(
    found: Sequence[Tensor], expected: Sequence[Tensor], batches: Sequence[CalibrationBatch], rtol: float, atol: float
) -> None:
    """Hidden states are equal by batch, apart from padding."""
    for batch, ours, theirs in zip(batches, found, expected, strict=True):
        valid = torch.ones(ours.shape[:2], dtype=torch.bool) if batch.valid is None else batch.valid
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=rtol, atol=atol)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
