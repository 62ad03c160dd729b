"""The cache of activations between two blocks: where they are stored, which tokens are padding, and which are held out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.solvers import CHUNK, Ranks, moved

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def chunks_in(windows: Iterable[int]) -> list[int]:
    """Tokens of each chunk that the solver visits: a window, or parts of ``CHUNK`` tokens of a longer window."""
    return [min(CHUNK, window - start) for window in windows for start in range(0, window, CHUNK)]


@dataclass
class ActivationCache:
    """Hidden states in front of a block, by calibration batch, and the other arguments of every block.

    Args:
        hidden: by batch, (batch, sequence, d).
        arguments: by block and batch, positional and keyword arguments (attention masks, rotary embeddings).
        valid: by batch, (batch, sequence) bool, False where padded. None: no padding.
        storage: device where hidden states are kept between forwards.
        fitted: number of windows that are fitted: the first ones. The others are held out.

    Attributes:
        windows: number of valid tokens of each window.
        tokens: number of valid tokens.
        replay_inputs: by batch, the input of the last projection of the current block's
            :class:`~sparsellm_lightning.architecture.Replay`. A later forward computes that module's output from it, as only
            that projection's weight has changed since. Empty: the module runs as a whole.
    """

    hidden: list[Tensor]
    arguments: list[list[Arguments]]
    valid: list[Tensor | None]
    storage: torch.device
    fitted: int
    windows: list[int] = field(init=False)
    tokens: int = field(init=False)
    replay_inputs: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.windows = [
            count
            for h, mask in zip(self.hidden, self.valid, strict=True)
            for count in ([h.shape[1]] * h.shape[0] if mask is None else mask.sum(1).tolist())
        ]
        self.tokens = sum(self.windows)

    def move_to(self, storage: torch.device) -> None:
        """Keep the hidden states on another device from now on."""
        self.storage = storage
        self.hidden = [moved(hidden, storage) for hidden in self.hidden]

    def copy(self) -> ActivationCache:
        """A cache that advances on its own. Tensors are shared."""
        return replace(self, hidden=list(self.hidden))

    def apart(self) -> ActivationCache:
        """A copy that has mappings of its own among the arguments, in which blocks leave keys and values for later blocks."""
        copies: dict[int, Any] = {}

        def own(value: Any) -> Any:
            if not isinstance(value, MutableMapping):
                return value
            return copies.setdefault(id(value), copy.copy(value))

        arguments = [
            [(tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}) for args, kwargs in batches]
            for batches in self.arguments
        ]
        return replace(self.copy(), arguments=arguments)

    def part(self, batches: Sequence[int]) -> ActivationCache:
        """A cache of some batches, in ascending order. Tensors are shared."""
        fitted = self.fitted_by_batch()
        return ActivationCache(
            [self.hidden[index] for index in batches],
            [[arguments[index] for index in batches] if arguments else [] for arguments in self.arguments],
            [self.valid[index] for index in batches],
            self.storage,
            sum(fitted[index] for index in batches),
        )

    def beginning(self, tokens: int, ranks: Ranks) -> ActivationCache:
        """A cache of the first batches, equally many on every rank, with about ``tokens`` valid tokens over all ranks.

        At least one batch, and at most ``4 · tokens`` positions, padding included.
        """
        starts = accumulate((len(hidden) for hidden in self.hidden), initial=0)
        valid = [sum(self.windows[start : start + len(h)]) for start, h in zip(starts, self.hidden, strict=False)]
        positions = [hidden.shape[:2].numel() for hidden in self.hidden]
        more = [0] * (ranks.largest(len(valid)) - len(valid))  # on ranks with fewer batches
        totals = [accumulate(ranks.total(*counts, *more)) for counts in (valid, positions)]
        off = [
            math.inf if number and taken > 4 * tokens else abs(tokens - found)
            for number, (found, taken) in enumerate(zip(*totals, strict=True))
        ]
        batches = off.index(min(off)) + 1 if off else 0
        return self.part(range(min(batches, len(self.hidden))))

    def forget_arguments(self, block: int) -> None:
        """Free the arguments of a block that runs no more."""
        self.arguments[block].clear()

    @property
    def fitted_tokens(self) -> int:
        """Number of valid tokens in fitted windows."""
        return sum(self.windows[: self.fitted])

    def fitted_by_batch(self) -> list[int]:
        """Number of fitted windows in each batch."""
        left, counts = self.fitted, []
        for hidden in self.hidden:
            counts.append(max(0, min(left, len(hidden))))
            left -= len(hidden)
        return counts

    def fitted_tokens_by_batch(self) -> list[int]:
        """Number of valid tokens in the fitted windows of each batch."""
        starts = accumulate((len(hidden) for hidden in self.hidden), initial=0)
        return [
            sum(self.windows[start : start + fitted])
            for start, fitted in zip(starts, self.fitted_by_batch(), strict=False)
        ]

    def chunks(self, windows: int | None = None) -> list[int]:
        """The chunks (:func:`chunks_in`) of the first ``windows`` windows. None: of all."""
        return chunks_in(self.windows[:windows])

    def valid_tokens(self) -> Iterator[Tensor]:
        """The hidden states without padding, (tokens, d), batch by batch."""
        for hidden, mask in zip(self.hidden, self.valid, strict=True):
            yield hidden.flatten(0, 1) if mask is None else hidden[mask.to(hidden.device)]
