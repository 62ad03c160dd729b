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

    Window i depends on ``seed`` and i only (and on the kind of device), neither on the batches nor on the number of ranks.
    Rounding does depend on them, and parts a window from its twin where two tokens are all but equal: in float32 a few times
    in a million tokens. An end-of-sequence token is a token like any other, after which the window goes on.

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
    mine = range(rank, rank + size * -(-count // size), size)
    windows = []
    with adapter.ranks.failing_together(), adapter.calibrating(model):
        for first in range(0, len(mine), batch_size):
            generators = [_generator(seed, i, device_of(model)) for i in mine[first : first + batch_size]]
            windows.append(_sample(model, start, length, generators, temperature, adapter))
        together = torch.stack(adapter.ranks.gather(torch.cat(windows)), dim=1)  # (share, ranks, length)
        adapter.finish(model)
    return together.flatten(0, 1)[:count].cpu()


def _generator(seed: int, window: int, device: torch.device) -> torch.Generator:
    # A text as the seed's seed: sums of seed and index would collide.
    return torch.Generator(device).manual_seed(random.Random(f"{seed}/{window}").getrandbits(63))


def _sample(
    model: PreTrainedModel,
    start: int,
    length: int,
    generators: list[torch.Generator],
    temperature: float,
    adapter: StrategyAdapter,
) -> Tensor:
    """(batch, length) tokens, one window for each generator."""
    tokens = [torch.full((len(generators), 1), start, device=generators[0].device)]
    cache = DynamicCache(config=model.config)
    while len(tokens) < length:
        logits = adapter.next_logits(model, tokens[-1], cache)
        chances = torch.softmax(logits.float() / temperature, -1)
        # A race of exponential clocks. One uniform number and the distribution function would draw from the same distribution,
        # but their rounding moves the edges of all tokens, and parted windows from their twins hundreds of times as often.
        # float64: a rare token wins by a time below the resolution of float32.
        clocks = [torch.empty_like(chances[0], dtype=torch.float64).exponential_(generator=g) for g in generators]
        tokens.append((chances / torch.stack(clocks)).argmax(-1, keepdim=True))
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
