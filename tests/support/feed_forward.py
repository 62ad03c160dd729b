"""Random feed-forward blocks, tokens for them, and naive float64 computations on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sparsellm_lightning.solvers import LOCAL_SOLVERS, FeedForward, InputStatistics, Pattern, find_activation

Targets = dict[str, Tensor]
TOKENS, DIM, WIDTH = 70, 5, 9


def make_block(
    activation: str = "silu",
    gated: bool = True,
    biases: bool = False,
    dim: int = DIM,
    width: int = WIDTH,
    seed: int = 0,
) -> FeedForward:
    """A random block."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return FeedForward(
        activation=find_activation(activation),
        up=random(width, dim) / dim**0.5,
        down=random(dim, width) / width**0.5,
        gate=random(width, dim) / dim**0.5 if gated else None,
        up_bias=random(width) * 0.5 if biases else None,
        gate_bias=random(width) * 0.5 if biases and gated else None,
        down_bias=random(dim) if biases else None,
    )


def make_tokens(block: FeedForward, n: int = TOKENS, noise: float = 0.1, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Correlated inputs, and the dense output plus noise. Because of the noise no weights reach the target."""
    generator = torch.Generator().manual_seed(seed)
    dim = block.up.shape[1]
    mixing = torch.eye(dim) + torch.randn(dim, dim, generator=generator) * 1.5 / dim**0.5
    x = torch.randn(n, dim, generator=generator) @ mixing
    y = naive_forward(block, x).float()
    return x, y + noise * y.std() * torch.randn(n, dim, generator=generator)


def naive_forward(block: FeedForward, x: Tensor) -> Tensor:
    """The block's output, in float64."""

    def linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return t @ weight.double().T + (0 if bias is None else bias.double())

    phi = ACT2FN[block.activation.name]
    z = linear(x.double(), block.up, block.up_bias)
    h = phi(z) if block.gate is None else phi(linear(x.double(), block.gate, block.gate_bias)) * z
    return linear(h, block.down, block.down_bias)


def true_error(block: FeedForward, x: Tensor, y: Tensor) -> float:
    """``‖Y − FFN(X)‖² / ‖Y‖²``, in float64."""
    return float((y.double() - naive_forward(block, x)).square().sum() / y.double().square().sum())


def prune_with(pattern: Pattern, solver: str = "sparsegpt") -> Callable[[Targets, InputStatistics], Targets]:
    """A ``Prune`` that gives every matrix to a local solver alone."""
    solve = LOCAL_SOLVERS[solver]
    return lambda targets, inputs: {name: solve(target.clone(), inputs, pattern) for name, target in targets.items()}
