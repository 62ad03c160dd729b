"""ADMM (Meng et al., ALPS, arXiv 2406.07831): splitting finds the support, then the kept weights are solved for."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm_lightning.solvers.factorization import spd_inverse
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.patterns import Pattern

_FIRST_PENALTY = 0.1
_CONVERGED = 1e-12  # share of the first squared residual at which conjugate gradients have converged in float32
_FLAT = 1e-6  # curvature below which float32 rounding decides, in units of h's unit diagonal
_EVERY = 3  # iterations between two comparisons of the support, and between two inverses, which take longest
_SETTLED = 2e-3  # number of entries of the support that come or go, as a share of its size, with which the loop ends
_GROWTH = 2.0  # of the penalty. ALPS has 1.1 to 1.3, which is slower and a little more accurate


def admm(
    weight: Tensor, gram: Tensor, damping: float, pattern: Pattern, iterations: int = 300, refinements: int = 5
) -> Tensor:
    """Approximately minimise ``‖(W − Ŵ) H^{1/2}‖`` over W in the pattern, by splitting W into B = D with D in the pattern.

    With ``H = G + λI``, ``n = √diag(H)``, ``H ← H / (n nᵀ)``, ``Ŵ ← Ŵ n`` and u the scaled multipliers, repeat

        B = (Ŵ H + ρ (D − u)) (H + ρI)⁻¹,    T = B + u,    D = the pattern's largest entries of T,    u = T − D

    Every three iterations ρ doubles. The loop ends when the support hardly changes. Conjugate-gradient steps on the fixed
    support follow.

    Args:
        weight: Ŵ, (rows, columns) float32; this rank's rows. Not changed.
        gram: G, of the inputs, (columns, columns) float32.
        damping: λ, as a fraction of G's mean diagonal.
        pattern: chooses the entries to keep. Its ``ranks`` hold the other rows.
        iterations: upper limit.
        refinements: conjugate-gradient steps on the support. Each row has its own step length.

    Returns:
        the pruned weight, a new tensor.

    Raises:
        NumericalError: the damped Gram matrix is not positive definite.
    """
    h = gram.clone()
    h.diagonal().add_(damping * gram.diagonal().mean())
    dead = gram.diagonal() <= 0  # features that were zero for every token: their weights cost nothing
    h.diagonal()[dead] = 1
    scale = h.diagonal().sqrt()
    h /= scale[:, None] * scale
    w = (weight * scale).masked_fill_(dead, 0)
    target = w @ h
    count(2 * w.numel() * len(h))
    rho = _FIRST_PENALTY
    inverse = spd_inverse(h, rho)
    d, u = w, torch.zeros_like(w)
    keep = support = pattern.select(w.square())
    if pattern.ranks.total(int((~keep).sum())) == [0]:
        return weight.clone()
    for iteration in range(iterations):
        count(2 * w.numel() * len(h))
        t = torch.addmm(u, torch.add(target, d - u, alpha=rho), inverse)
        keep = pattern.select(t.square())
        d = t * keep
        u = t - d
        if (iteration + 1) % _EVERY == 0:
            moved, size = pattern.ranks.total(int((keep ^ support).sum()), int(keep.sum()))
            if moved <= _SETTLED * size:
                break
            support = keep
            rho *= _GROWTH
            u /= _GROWTH
            inverse = spd_inverse(h, rho)
    solved = solve_on_support(d, target, h, keep, refinements) / scale
    # Kept weights of dead inputs stay as they are.
    return torch.where(keep & dead, weight, solved)


def solve_on_support(weight: Tensor, target: Tensor, h: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Conjugate-gradient steps towards ``argmin ½⟨W H, W⟩ − ⟨T, W⟩`` with zeros where not ``keep``, row by row.

    Args:
        weight: starting point, (rows, columns), zero outside the support.
        target: T, like weight: ``Ŵ H`` for the weights Ŵ to be approximated.
        h: H, (columns, columns), positive definite. A unit diagonal converges fastest.
        keep: the support, bool.
        steps: number of steps. More than ``columns`` have no use.
    """
    count(2 * (steps + 1) * weight.numel() * len(h))
    residual = (target - weight @ h) * keep
    direction = residual
    squares = residual.square().sum(1, keepdim=True)
    least = squares * _CONVERGED
    for _ in range(steps):
        image = (direction @ h) * keep
        curvature = (direction * image).sum(1, keepdim=True)
        # A row stops where it has converged, or where rounding decides the curvature: further steps would diverge.
        moves = (squares > least) & (curvature > _FLAT * direction.square().sum(1, keepdim=True))
        length = torch.where(moves, squares / curvature, 0)
        weight = weight + length * direction
        residual = residual - length * image
        before, squares = squares, residual.square().sum(1, keepdim=True)
        direction = torch.where(moves, residual + squares / before * direction, 0)
    return weight
