"""Calibration windows that the model writes itself, for those who have no text."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsellm_lightning.architectures import device_of
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.strategies import StrategyAdapter


@torch.no_grad()
def generate_windows(
    model: PreTrainedModel,
    count: int,
    length: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
    temperature: float = 1.0,
    adapter: StrategyAdapter | None = None,
) -> Tensor:
    """Windows sampled from a causal language model, token by token, from its beginning-of-sequence token on.

    Window i depends on ``seed`` and i only: neither on the batches nor on the number of ranks, except where rounding, which
    does depend on them, tips a draw that falls on the edge between two tokens. An end-of-sequence token is a token like any
    other, after which the window goes on.

    Args:
        model: with a language-model head.
        count: number of windows, over all ranks.
        length: tokens per window, the first included.
        seed: seed of the draws.
        batch_size: windows generated at a time on each rank, whose keys and values must fit into memory.
        temperature: divides the logits; 1 samples the model's own distribution.
        adapter: of the strategy the model runs under; all ranks call it together, and each generates its share.

    Returns:
        (count, length) int64 on the CPU, the same on every rank.

    Raises:
        UserError: a value out of its range, windows longer than the model's context, no token to start from, or no
            language-model head.
    """
    _check(model, count, length, batch_size, temperature)
    start = _first_token(model)
    adapter = adapter or StrategyAdapter()
    rank, size = adapter.ranks.rank, adapter.ranks.size
    # Every rank makes as many windows, hence as many forwards, as the one with most; what is beyond count is cut off.
    share = -(-count // size)
    draws = torch.stack([_draws(seed, rank + size * i, length - 1) for i in range(share)]).to(device_of(model))
    with adapter.ranks.failing_together(), adapter.calibrating(model):
        mine = torch.cat([_continue(model, start, part, temperature, adapter) for part in draws.split(batch_size)])
        windows = torch.stack(adapter.ranks.gather(mine), dim=1)  # window i is row i // size of rank i % size
        adapter.finish(model)
    return windows.flatten(0, 1)[:count].cpu()


def _draws(seed: int, window: int, count: int) -> Tensor:
    """Uniform numbers of one window, shape (count,): a text as seed, since sums of seed and index would collide."""
    rng = random.Random(f"{seed}/{window}")
    return torch.tensor([rng.random() for _ in range(count)], dtype=torch.float64)


def _continue(
    model: PreTrainedModel, start: int, draws: Tensor, temperature: float, adapter: StrategyAdapter
) -> Tensor:
    """(batch, n + 1) tokens: the start, and one for each of the (batch, n) draws."""
    tokens = [torch.full((len(draws), 1), start, device=draws.device)]
    cache = DynamicCache(config=model.config)
    for draw in draws.split(1, dim=1):
        logits = adapter.next_logits(model, tokens[-1], cache)
        # The inverse of the distribution function: the first token at which it exceeds the draw.
        summed = torch.softmax(logits.float() / temperature, -1).double().cumsum(-1)
        token = torch.searchsorted(summed, draw * summed[:, -1:], right=True)
        tokens.append(token.clamp_(max=summed.shape[1] - 1))
    return torch.cat(tokens, 1)


def _check(model: PreTrainedModel, count: int, length: int, batch_size: int, temperature: float) -> None:
    if min(count, length, batch_size) < 1 or not 0 < temperature < math.inf:
        raise UserError(
            "generation needs count, length and batch_size of at least 1 and a temperature above 0, got "
            f"{count}, {length}, {batch_size} and {temperature}. Correct these."
        )
    if model.get_output_embeddings() is None:
        raise UserError(
            f"generation needs a language-model head, which {type(model).__name__} has not. Calibrate it on text."
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise UserError(
            f"generated windows must fit into the model's context of {context} tokens, got length {length}. "
            "Give a smaller length (sequence_length)."
        )


def _first_token(model: PreTrainedModel) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.config.get_text_config(), model.generation_config):
            token = getattr(config, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, (list, tuple)) else token)
    raise UserError(
        "generation starts from the model's beginning- or end-of-sequence token, got neither in its configuration. Set "
        "model.config.bos_token_id."
    )
