"""A feed-forward network as tensors, and the chunks of tokens that the alternation visits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.solvers.activations import Activation
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.ranks import Ranks

CHUNK = 1024  # tokens per step: enough for efficient products, few enough that auxiliaries stay in the cache


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network as tensors: ``y = W_d (φ(W_g x + b_g) ⊙ (W_u x + b_u)) + b_d``, or ``W_d φ(W_u x + b_u) + b_d``.

    Args:
        activation: φ.
        up, gate: (f, d) float32. ``gate`` is None in a plain block.
        down: (d, f) float32.
        up_bias, gate_bias, down_bias: (f,), (f,) and (d,), or None.
        up_bounds: of a gated block, between which ``W_u x + b_u`` is clamped. None: it is not.
    """

    activation: Activation
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    up_bounds: tuple[float, float] | None = None

    @property
    def first_layers(self) -> list[str]:
        """The layers that see the block's input."""
        return ["up"] if self.gate is None else ["gate", "up"]

    def to(self, dtype: torch.dtype) -> FeedForward:
        """The same weights and biases in another dtype."""
        tensors: Any = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``z`` and ``s`` for tokens x, (n, d): each (n, f). ``s`` is None in a plain block."""
        linear = torch.nn.functional.linear
        count(2 * len(self.first_layers) * len(x) * self.up.numel(), x.dtype)
        return linear(x, self.up, self.up_bias), (None if self.gate is None else linear(x, self.gate, self.gate_bias))

    def combine(self, z: Tensor, s: Tensor | None) -> Tensor:
        """The hidden activation ``φ(s) ⊙ z``, or ``φ(z)``."""
        if s is None:
            return self.activation(z)
        return self.activation(s) * (z if self.up_bounds is None else z.clamp(*self.up_bounds))

    def hidden(self, x: Tensor) -> Tensor:
        """(n, f) hidden activation for tokens x, (n, d)."""
        return self.combine(*self.preactivations(x))

    def output(self, hidden: Tensor) -> Tensor:
        """(n, d) output for hidden activations, (n, f)."""
        count(2 * len(hidden) * self.down.numel(), hidden.dtype)
        return torch.nn.functional.linear(hidden, self.down, self.down_bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))


def chunk_sizes(x: Tensor, chunks: Sequence[int] | None) -> list[int]:
    """The given numbers of tokens, or :data:`CHUNK` each."""
    return [len(part) for part in x.split(CHUNK)] if chunks is None else list(chunks)


class Tokens:
    """This rank's tokens in chunks: input, target without the down bias, and target, each float32 on ``device``, and ``√a``.

    a is the weight of a token's squared error: statistics multiply each token by ``√a``, (n, 1), or 1.0 without weights.

    Args:
        x: input of the feed-forward network, (n, d), any dtype and device.
        y: target output, (n, d), any dtype and device.
        down_bias: bias of the down projection, or None.
        chunks: tokens of each chunk, summing to n. None: ``CHUNK`` each.
        device: that computes.
        weights: a, (n,) float32, or None for 1.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        down_bias: Tensor | None,
        chunks: Sequence[int] | None,
        device: torch.device,
        weights: Tensor | None = None,
    ) -> None:
        self.x, self.y, self.down_bias, self.device, self.weights = x, y, down_bias, device, weights
        self.sizes = chunk_sizes(x, chunks)

    def part(self, first: int, last: int | None = None) -> Tokens:
        """Chunks ``first`` to ``last`` (exclusive)."""
        before, sizes = sum(self.sizes[:first]), self.sizes[first:last]
        chosen = slice(before, before + sum(sizes))
        weights = None if self.weights is None else self.weights[chosen]
        return Tokens(self.x[chosen], self.y[chosen], self.down_bias, sizes, self.device, weights)

    def energies(self, ranks: Ranks) -> Tensor:
        """``‖√a (Y − b_d)‖²``, ``‖√a Y‖²`` and the number of tokens, over all ranks: (3,) float64."""
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        for _, y_c, y_raw, root in self:
            squares = [scaled(y, root).square().sum(dtype=torch.float64) for y in (y_c, y_raw)]
            total += torch.stack([*squares, total.new_tensor(len(y_c))])
        ranks.sum_(total)
        return total

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | float]]:
        roots = square_roots(self.weights, self.sizes, self.device)
        for x_c, y_c, root in zip(self.x.split(self.sizes), self.y.split(self.sizes), roots, strict=True):
            y_raw = y_c.to(self.device, torch.float32, non_blocking=True)
            yield (
                x_c.to(self.device, torch.float32, non_blocking=True),
                y_raw if self.down_bias is None else y_raw - self.down_bias,
                y_raw,
                root,
            )


def square_roots(weights: Tensor | None, sizes: Sequence[int], device: torch.device) -> list[Tensor | float]:
    """``√a`` by chunk, (n, 1) each, or 1.0 without weights."""
    if weights is None:
        return [1.0] * len(sizes)
    return [part[:, None] for part in weights.to(device, torch.float32).sqrt().split(list(sizes))]


def scaled(t: Tensor, root: Tensor | float) -> Tensor:
    """``√a t``, for t of any dtype, in that dtype."""
    return t if isinstance(root, float) else (t * root).to(t.dtype)


def squared_error(feed_forward: FeedForward, tokens: Tokens, ranks: Ranks) -> float:
    """``‖√a (FFN(X) − Y)‖²`` over all ranks."""
    squares = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for x_c, _, y_c, root in tokens:
        squares += scaled(feed_forward(x_c).sub_(y_c), root).square().sum(dtype=torch.float64)
    ranks.sum_(squares)
    return float(squares)
