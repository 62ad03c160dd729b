"""A feed-forward block as tensors, this rank's tokens in front of it and behind it, and what it makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.placement import Shelf, empty
from sparsellm_lightning.ranks import Ranks
from sparsellm_lightning.solvers.activations import Activation
from sparsellm_lightning.stopwatch import count

CHUNK = 1024  # tokens per step: large enough for efficient products, small enough that auxiliaries stay near the cache


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block as tensors: ``y = W_d (φ(W_g x + b_g) ⊙ (W_u x + b_u)) + b_d``, or ``W_d φ(W_u x + b_u) + b_d``.

    Args:
        activation: φ.
        up, gate: (f, d) float32; ``gate=None`` for a plain block.
        down: (d, f) float32.
        up_bias, gate_bias, down_bias: (f,), (f,) and (d,), or None.
    """

    activation: Activation
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def matrices(self) -> int:
        """2, or 3 for a gated block."""
        return 2 if self.gate is None else 3

    def to(self, dtype: torch.dtype) -> FeedForward:
        """The same weights and biases in another dtype."""
        tensors: Any = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``z`` and ``s`` (None when not gated) for tokens x, (n, d): each (n, f)."""
        linear = torch.nn.functional.linear
        count(2 * (self.matrices - 1) * len(x) * self.up.numel(), x.dtype)
        return linear(x, self.up, self.up_bias), (None if self.gate is None else linear(x, self.gate, self.gate_bias))

    def combine(self, z: Tensor, s: Tensor | None) -> Tensor:
        """The hidden activation ``φ(s) ⊙ z``, or ``φ(z)``."""
        return self.activation(z) if s is None else self.activation(s) * z

    def hidden(self, x: Tensor) -> Tensor:
        """(n, f) hidden activation for tokens x, (n, d)."""
        return self.combine(*self.preactivations(x))

    def output(self, hidden: Tensor) -> Tensor:
        """(n, d) output for hidden activations, (n, f)."""
        count(2 * len(hidden) * self.down.numel(), hidden.dtype)
        return torch.nn.functional.linear(hidden, self.down, self.down_bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))


class Tokens:
    """Chunks of this rank's tokens in float32, on the device that computes: input, target less the down bias, target."""

    def __init__(
        self, x: Tensor, y: Tensor, down_bias: Tensor | None, chunks: Sequence[int] | None, device: torch.device
    ) -> None:
        self.x, self.y, self.down_bias, self.device = x, y, down_bias, device
        self.sizes = [len(part) for part in x.split(CHUNK)] if chunks is None else list(chunks)
        self.count = sum(self.sizes)

    def part(self, first: int, last: int | None = None) -> Tokens:
        """Only these chunks."""
        before, sizes = sum(self.sizes[:first]), self.sizes[first:last]
        chosen = slice(before, before + sum(sizes))
        return Tokens(self.x[chosen], self.y[chosen], self.down_bias, sizes, self.device)

    def energies(self, ranks: Ranks) -> Tensor:
        """``‖Y − b_d‖²``, ``‖Y‖²`` and the number of tokens, over all ranks, float64."""
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        for _, y_c, y_raw in self:
            squares = [y.square().sum(dtype=torch.float64) for y in (y_c, y_raw)]
            total += torch.stack([*squares, total.new_tensor(len(y_c))])
        ranks.sum_(total)
        return total

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for x_c, y_c in zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True):
            y_raw = y_c.to(self.device, torch.float32)
            yield (
                x_c.to(self.device, torch.float32),
                y_raw if self.down_bias is None else y_raw - self.down_bias,
                y_raw,
            )


def change_of_output(
    feed_forward: FeedForward,
    tokens: Tokens,
    fitted: int,
    ranks: Ranks,
    out: Tensor | None = None,
    hidden: Shelf | None = None,
) -> tuple[Tensor, Tensor]:
    """``FFN(X) − Y`` of this rank's tokens, (n, d) in Y's dtype, and its squares over all ranks.

    Args:
        feed_forward: whose output; its weights are on the device that computes.
        tokens: X and Y.
        fitted: the squares of the first so many chunks are counted apart.
        ranks: the data-parallel ranks.
        out: where to write the change, such as Y itself.
        hidden: the hidden activation of the first ``fitted`` chunks, where it was kept.

    Returns:
        the change; and (2,) float64: ``‖FFN(X) − Y‖²`` over the fitted chunks, and over the others.
    """
    if out is None:
        out = empty(tokens.y.shape, tokens.y.dtype, tokens.y.device, tokens.device)
    squares = torch.zeros(2, dtype=torch.float64, device=tokens.device)
    start = 0
    for index, (x_c, _, y_c) in enumerate(tokens):
        # Rounded as the model rounds it, whether it was kept or not.
        kept = hidden is not None and index < fitted
        h = hidden.get(index, tokens.device) if kept else feed_forward.hidden(x_c).to(tokens.x.dtype)  # type: ignore[union-attr]
        change = feed_forward.output(h.float()).sub_(y_c)
        squares[int(index >= fitted)] += change.square().sum(dtype=torch.float64)
        out[start : start + len(change)] = change
        start += len(change)
    ranks.sum_(squares)
    return out, squares


def squared_error(feed_forward: FeedForward, tokens: Tokens, ranks: Ranks) -> float:
    """``‖FFN(X) − Y‖²`` over all ranks."""
    squares = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for x_c, _, y_c in tokens:
        squares += feed_forward(x_c).sub_(y_c).square().sum(dtype=torch.float64)
    ranks.sum_(squares)
    return float(squares)
