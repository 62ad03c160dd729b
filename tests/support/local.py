"""Pruning problems of one matrix, and naive solutions."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Mask without the round(sparsity * n) smallest scores. Equal scores are pruned in the order of a stable Python sort."""
    flat = scores.flatten().tolist()
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[sorted(range(len(flat)), key=flat.__getitem__)[: round(sparsity * len(flat))]] = False
    return mask.view(scores.shape)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 1.5 / columns**0.5
    x = (
        torch.randn(4 * columns, columns, generator=generator)
        @ mixing
        * torch.rand(columns, generator=generator).add(0.2)
    )
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def damped(gram: Tensor) -> Tensor:
    """The Gram matrix with :data:`DAMPING`, in float64."""
    return gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram)).double()


def best_error(weight: Tensor, h: Tensor, kept: Tensor) -> float:
    """``min tr((W − V) H (W − V)ᵀ)`` over V that is zero in the columns that are not kept, in float64."""
    removed = weight.double()[:, ~kept]
    schur = h[~kept][:, ~kept] - h[~kept][:, kept] @ torch.linalg.solve(h[kept][:, kept], h[kept][:, ~kept])
    return float((removed @ schur @ removed.T).trace())


def least_squares(weight: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    """The best weights on a support, row by row, in float64."""
    result = torch.zeros_like(weight).double()
    for row, support in enumerate(keep):
        wanted = (h @ weight[row].double())[support]
        result[row, support] = torch.linalg.solve(h[support][:, support], wanted)
    return result
