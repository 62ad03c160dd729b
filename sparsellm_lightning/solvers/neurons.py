"""Hidden units of a feed-forward block: which to remove, and the down projection that makes up for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.solvers.factorization import factorize
from sparsellm_lightning.solvers.feed_forward import CHUNK, FeedForward
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.statistics import Gram, InputStatistics, check_finite

_STEPS = 512  # largest number of times that the scores are computed anew

ChooseUnits = Callable[[FeedForward, InputStatistics, int], Tensor]
"""(block, statistics of its hidden activation, number of units to keep) -> (f,) bool, True = kept."""


def units_by_magnitude(dense: FeedForward, hidden: InputStatistics, keep: int) -> Tensor:
    """Keep the units with the largest ``‖W_u[j]‖² + ‖W_g[j]‖² + ‖W_d[:, j]‖²``."""
    scores = dense.up.square().sum(1) + dense.down.square().sum(0)
    if dense.gate is not None:
        scores += dense.gate.square().sum(1)
    return _largest(scores, keep)


def units_by_wanda(dense: FeedForward, hidden: InputStatistics, keep: int) -> Tensor:
    """Keep the units with the largest ``‖W_d[:, j]‖₁ ‖h_j‖``: Wanda's score, added up over a column (Wanda-sp)."""
    return _largest(dense.down.abs().sum(0) * hidden.gram.diagonal().sqrt(), keep)


def units_by_surgeon(dense: FeedForward, hidden: InputStatistics, keep: int) -> Tensor:
    """Remove, one after the other, the unit without which the others can best give the output.

    With ``H = hᵀh / n + λI``, the squared error of removing unit j, the others making up for it as well as they can, is

        ``‖W_d[:, j]‖² / (H⁻¹)_jj``

    (optimal brain surgeon, for a whole column). Then ``W_d −= W_d[:, j] (H⁻¹)_j / (H⁻¹)_jj``, and the same for ``H⁻¹``. Of more
    than 512 units to remove, several leave at a time, which do not see each other.

    Args:
        dense: the block.
        hidden: statistics of its hidden activation, whose damping gives λ.
        keep: number of units to keep.

    Returns:
        (f,) bool, True = kept.
    """
    upper = hidden.factor.upper
    inverse, down = upper.T @ upper, dense.down.clone()
    left = torch.ones(len(inverse), dtype=torch.bool, device=down.device)
    remove = len(inverse) - keep
    for step in range(min(_STEPS, remove)):
        together = remove * (step + 1) // min(_STEPS, remove) - remove * step // min(_STEPS, remove)
        scores = (down.square().sum(0) / inverse.diagonal().clamp(min=1e-30)).masked_fill_(hidden.factor.dead, 0)
        units = scores.masked_fill_(~left, torch.inf).topk(together, largest=False).indices
        left[units] = False
        solved = torch.linalg.solve(inverse[units][:, units], inverse[units])
        down -= down[:, units] @ solved
        inverse -= inverse[:, units] @ solved
        count(2 * together * (down.numel() + inverse.numel()))
    return left


_CHOICES: dict[str, ChooseUnits] = {
    "magnitude": units_by_magnitude,
    "wanda": units_by_wanda,
    "sparsegpt": units_by_surgeon,
    "admm": units_by_surgeon,
}


@dataclass(frozen=True)
class Removal:
    """A feed-forward block without some of its hidden units.

    Args:
        small: the block of those that are left.
        kept: (f,) bool, over the dense block's units.
        hidden: statistics of the dense block's hidden activation.
    """

    small: FeedForward
    kept: Tensor
    hidden: InputStatistics


@torch.no_grad()
def remove_units(
    dense: FeedForward,
    x: Tensor,
    keep: int,
    solver: str,
    *,
    damping: float = 0.01,
    ranks: Ranks = SINGLE,
    chunks: Sequence[int] | None = None,
    name: str = "",
) -> Removal:
    """Remove hidden units by the criterion of a local solver.

    Args:
        dense: the block, whole, float32.
        x: its input, (n, d), this rank's fitted tokens, any dtype and device.
        keep: number of units to keep.
        solver: ``magnitude``, ``wanda``, or ``sparsegpt`` and ``admm``, which both are optimal brain surgeon for whole units
            and refit the down projection.
        damping, ranks, chunks, name: see :func:`~sparsellm_lightning.solvers.solve_feed_forward`.

    Raises:
        NumericalError: NaN or infinity in the hidden activation.
    """
    gram = Gram(dense.down.shape[1], dense.down.device)
    for part in x.split(CHUNK if chunks is None else list(chunks)):
        gram.add(dense.hidden(part.to(dense.down.device, torch.float32)))
    mean = gram.mean(ranks)
    check_finite(mean, f"{name}down")
    hidden = InputStatistics(mean, damping, f"{name}down")
    kept = _CHOICES[solver](dense, hidden, keep)
    return Removal(without_units(dense, hidden, kept, refit=_CHOICES[solver] is units_by_surgeon), kept, hidden)


def without_units(dense: FeedForward, hidden: InputStatistics, kept: Tensor, refit: bool = True) -> FeedForward:
    """The smaller block with the kept units K.

    With R the removed units and ``H = hᵀh / n + λI``, the down projection that is closest to the dense one on h is

        ``W_d[:, K] + W_d[:, R] H_RK (H_KK)⁻¹``

    Args:
        dense: the block.
        hidden: statistics of its hidden activation, whose damping gives λ.
        kept: (f,) bool.
        refit: False: the down projection is ``W_d[:, K]``.
    """
    down = dense.down[:, kept]
    if refit:
        gram = hidden.gram[kept][:, kept]
        # λ stays that of the whole matrix.
        damping = hidden.damping * float(hidden.gram.diagonal().mean()) / (float(gram.diagonal().mean()) or 1.0)
        factor = factorize(gram, damping, hidden.name)
        count(2 * dense.down.shape[0] * hidden.gram.numel())
        down = down + factor.solve(dense.down[:, ~kept] @ hidden.gram[~kept][:, kept])
    first: dict[str, Any] = {
        name: value[kept]
        for name, value in vars(dense).items()
        if name in ("gate", "up", "gate_bias", "up_bias") and value is not None
    }
    return replace(dense, down=down, **first)


def with_zeros(small: FeedForward, kept: Tensor) -> dict[str, Tensor]:
    """The weights ``gate``, ``up`` and ``down`` of a smaller block in matrices of the full size, with zeros for the others."""
    full = {}
    for name in ("gate", "up", "down"):
        weight: Tensor | None = getattr(small, name)
        if weight is not None:
            axis = int(name == "down")
            shape = (len(kept), weight.shape[1]) if axis == 0 else (weight.shape[0], len(kept))
            full[name] = weight.new_zeros(shape).index_copy_(axis, kept.nonzero().flatten(), weight)
    return full


def _largest(scores: Tensor, keep: int) -> Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:keep]] = True
    return kept
