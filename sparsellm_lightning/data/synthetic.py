"""Windows of tokens that the model writes: in place of a text, or beside one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sparsellm_lightning.architecture import context_of, device_of, vocabulary_of
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.runtime import explaining_memory, format_bytes, tracked
from sparsellm_lightning.solvers import count

PROMPT = 32  # largest number of tokens of a prompt, and of its continuation
HELD_TOKENS = 8192  # largest number of tokens whose keys and values are in memory at once, on each rank
HELD_BYTES = 2**31  # largest size of these keys and values


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
    """Sample windows from a causal language model, token by token, starting with its beginning- (or end-) of-sequence token.

    The draws of window i depend on ``seed``, i and the kind of device, but not on batches or ranks. Rounding depends on batches
    and ranks, and changes a token where two tokens, or two groups of them, are almost equally likely: in float32, a few times
    in a million tokens. An end-of-sequence token does not end a window.

    Args:
        model: with a language-model head.
        count: number of windows, over all ranks.
        length: tokens per window, including the first.
        seed: seed of the draws.
        batch_size: windows generated at once on each rank. Their keys and values must fit into memory.
        temperature: divides the logits. 1 samples the model's own distribution.
        adapter: of the strategy the model runs under. None: a single device. All ranks call this together, and each generates
            its share.

    Returns:
        (count, length) int64 on the CPU, the same on every rank.

    Raises:
        UserError: a value out of its range, windows longer than the model's context, no token to start from, or no
            language-model head.
    """
    _check(model, count, length, batch_size, temperature)
    start = torch.full((1, 1), _first_token(model), device=device_of(model))
    adapter = adapter or StrategyAdapter()
    rank, size = adapter.ranks.rank, adapter.ranks.size
    # Every rank makes equally many windows, hence forwards. Windows beyond count are dropped.
    mine = range(rank, rank + size * -(-count // size), size)
    windows = []
    with adapter.ranks.failing_together("Generation"), adapter.calibrating(model):
        cached = _follows_cache(model, adapter)
        for first in range(0, len(mine), batch_size):
            generators = [_generator(f"{seed}/{i}", start.device) for i in mine[first : first + batch_size]]
            prompts = start.expand(len(generators), 1)
            windows.append(
                torch.cat([prompts, _sample(model, prompts, length - 1, generators, temperature, adapter, cached)], 1)
            )
        together = torch.stack(adapter.ranks.gather(torch.cat(windows)), dim=1)  # (share, ranks, length)
        adapter.finish(model)
    return together.flatten(0, 1)[:count].cpu()


@torch.no_grad()
def rewrite_windows(
    model: PreTrainedModel,
    windows: Tensor,
    names: Sequence[str],
    adapter: StrategyAdapter,
    autocast: torch.dtype = torch.float32,
    *,
    from_random_tokens: bool = False,
) -> Tensor:
    """For each window, another one of the same length that the model writes.

    The window is cut into parts of at most :data:`PROMPT` tokens (the last two may overlap). Each part is a prompt. The
    continuations are as long as their prompts, are sampled from the model's own distribution, and are joined. Short parts need
    few sequential steps.

    Args:
        model: with a language-model head, in evaluation mode.
        windows: (n, length) int64, equally many on every rank.
        names: of the windows: seeds of the draws.
        adapter: of the strategy the model runs under. All ranks call this together, each with its own windows.
        autocast: dtype of the products if the model is float32. With less than float32 the result depends on batches and ranks.
        from_random_tokens: each written part begins with a token drawn uniformly from the vocabulary instead, and the model
            continues that token (LLM-QAT, arXiv 2305.17888, does so). The windows give the length only.

    Returns:
        (n, length) int64 on the windows' device.

    Raises:
        UserError: no language-model head.
        OutOfMemoryError: no room for the keys and values.
    """
    _check_head(model)
    number, length = windows.shape
    parts = -(-length // int(max(min(PROMPT, context_of(model) / 2), 1)))
    size = -(-length // parts)
    if from_random_tokens:
        vocabulary = vocabulary_of(model)
        cpu = torch.device("cpu")
        drawn = [torch.randint(vocabulary, (parts, 1), generator=_generator(name, cpu)) for name in names]
        prompts, new = torch.cat(drawn), size - 1
    else:
        starts = [min(size * part, length - size) for part in range(parts)]
        prompts, new = torch.stack([windows[:, start : start + size] for start in starts], 1).flatten(0, 1), size
    room = prompts.shape[1] + new
    a_token = _bytes_of_a_token(model)
    at_once = min(max(min(HELD_TOKENS, HELD_BYTES // a_token) // room, 1), len(prompts))
    explained = explaining_memory(
        lambda: (
            f"In the windows that the model writes: keys and values of {room * at_once} tokens take "
            f"{format_bytes(room * at_once * a_token)}. Set continuations to 0."
        )
    )
    written = []
    lower = model.dtype == torch.float32 != autocast
    base: PreTrainedModel = model.base_model  # type: ignore[assignment]
    head = sum(parameter.numel() for parameter in model.get_output_embeddings().parameters())
    body = base.num_parameters(exclude_embeddings=True)
    computed = autocast if lower else model.dtype
    # Cached casts of gathered shards would add up to the whole model.
    cast = torch.autocast(device_of(model).type, autocast, lower, cache_enabled=not adapter.weights_are_split)
    with explained, cast:
        cached = _follows_cache(model, adapter)
        count(2 * (12 * body + 8 * head), computed)  # its tokens and logits
        tokens = room - 1 if cached else sum(range(room - new, room))
        for first in tracked(range(0, len(prompts), at_once), "Writing windows", "part"):
            some = prompts[first : first + at_once].to(device_of(model))
            rows = range(first, first + len(some))
            generators = [_generator(f"{names[row // parts]}/{row % parts}", some.device) for row in rows]
            sampled = _sample(model, some, new, generators, 1.0, adapter, cached)
            written.append(torch.cat([some, sampled], 1)[:, -size:])
            count(2 * len(some) * (body * tokens + head * new), computed)
    return torch.cat(written).view(number, parts * size)[:, :length].to(windows.device)


def _bytes_of_a_token(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    numbers = 0
    for layer in getattr(config, "per_layer_config", [config] * config.num_hidden_layers):  # Gemma 4's layers differ
        heads = getattr(layer, "num_attention_heads", None) or 1  # Mamba has none, and a state that does not grow
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        numbers += 2 * (getattr(layer, "num_key_value_heads", None) or heads) * width
    return numbers * model.dtype.itemsize


def _generator(name: str, device: torch.device) -> torch.Generator:
    # Hashed from a text, because sums of seed and index would collide.
    return torch.Generator(device).manual_seed(random.Random(name).getrandbits(63))


def _sample(
    model: PreTrainedModel,
    prompts: Tensor,
    length: int,
    generators: list[torch.Generator],
    temperature: float,
    adapter: StrategyAdapter,
    cached: bool,
) -> Tensor:
    """The next tokens after prompts: (batch, length) after (batch, at least 1). Each row has its own generator."""
    cache = _cache(model, prompts.shape[1] + length) if cached else None
    tokens = [prompts]
    while len(tokens) <= length:
        logits = adapter.next_logits(model, torch.cat(tokens, 1) if cache is None else tokens[-1], cache)
        # Row by row, because a row fits into the processor's cache.
        winners = [
            _draw(row.float() / temperature, generator) for row, generator in zip(logits, generators, strict=True)
        ]
        tokens.append(torch.stack(winners))
    return torch.cat([prompts[:, :0], *tokens[1:]], 1)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from the softmax of logits (vocabulary,), as (1,) int64.

    First a group of about √vocabulary tokens is drawn, then one of them: fewer random numbers than tokens.
    """
    width = math.isqrt(len(logits) - 1) + 1
    square = torch.nn.functional.pad(logits, (0, width * width - len(logits)), value=-math.inf)
    chances = torch.softmax(square, -1).view(width, width)
    group = _first(chances.sum(1), generator)
    return group * width + _first(chances[group].squeeze(0), generator)


def _first(chances: Tensor, generator: torch.Generator) -> Tensor:
    """An index drawn in proportion to chances (n,), as (1,) int64.

    By exponential clocks: the index with the smallest clock / chance wins. Inverting the distribution function would be far
    more sensitive to rounding. float64, because a rare token wins with a time below float32's resolution.
    """
    clocks = torch.empty_like(chances, dtype=torch.float64).uniform_(generator=generator).log_().neg_()
    return clocks.reciprocal_().mul_(chances).argmax(-1, keepdim=True)


def _cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache for ``room`` tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_InPlace(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _follows_cache(model: PreTrainedModel, adapter: StrategyAdapter) -> bool:
    """Whether a model gives the same logits token by token, with an ordinary cache, as for all tokens together.

    Some have caches of their own, or none, and ignore what they are given. Two windows, because some keep the state of the
    one before.
    """
    for ids in torch.tensor([[[1, 2, 3]], [[3, 1, 2]]], device=device_of(model)):
        try:
            whole = adapter.next_logits(model, ids, None)
            cache = _cache(model, ids.shape[1])
            stepwise = [adapter.next_logits(model, token, cache) for token in ids.split(1, dim=1)][-1]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        tolerance = 1e-2 if whole.dtype in (torch.float32, torch.float64) else 1e-1
        whole, stepwise = whole.float(), stepwise.float()
        if not float((stepwise - whole).norm()) <= tolerance * float((whole - whole.mean()).norm()):
            return False
    return True


class _InPlace(DynamicLayer):
    """Keys and values of a layer in a preallocated buffer. ``DynamicLayer`` copies all of them for each token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [x.new_empty(*x.shape[:-2], self.room, x.shape[-1]) for x in (key_states, value_states)]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values


def _check(model: PreTrainedModel, count: int, length: int, batch_size: int, temperature: float) -> None:
    if min(count, length, batch_size) < 1 or not 0 < temperature < math.inf:
        raise UserError(
            "generation needs count, length and batch_size of at least 1 and a temperature above 0, got "
            f"{count}, {length}, {batch_size} and {temperature}. Correct these."
        )
    _check_head(model)
    context = context_of(model)
    if length > context:
        raise UserError(
            f"generated windows must fit into the model's context of {context} tokens, got length {length}. "
            "Give a smaller length (sequence_length)."
        )


def _check_head(model: PreTrainedModel) -> None:
    if model.get_output_embeddings() is None:
        raise UserError(
            f"generation needs a language-model head, which {type(model).__name__} has not. Calibrate it on text alone: with "
            "another source than self, and continuations 0."
        )


def _first_token(model: PreTrainedModel) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
            token = getattr(config, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, (list, tuple)) else token)
    raise UserError(
        "generation starts from the model's beginning- or end-of-sequence token, got neither in its configuration. Set "
        "model.config.bos_token_id."
    )
