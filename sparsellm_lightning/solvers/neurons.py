"""Hidden units of a feed-forward network: which to remove, and the down projection that makes up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.solvers.columns import choose_columns, refit_columns, refits
from sparsellm_lightning.solvers.feed_forward import FeedForward, chunk_sizes
from sparsellm_lightning.solvers.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.statistics import Gram, InputStatistics


@dataclass(frozen=True)
class Removal:
    """A feed-forward network without some of its hidden units.

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
    """Remove hidden units by the criterion of a local solver, see :func:`~sparsellm_lightning.solvers.choose_columns`.

    A unit is a row of up and gate, and a column of down. Its magnitude is ``‖W_u[j]‖² + ‖W_g[j]‖² + ‖W_d[:, j]‖²``.

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
    for part in x.split(chunk_sizes(x, chunks)):
        gram.add(dense.hidden(part.to(dense.down.device, torch.float32, non_blocking=True)))
    hidden = gram.statistics(damping, ranks, f"{name}down")
    magnitudes = dense.up.square().sum(1) + dense.down.square().sum(0)
    if dense.gate is not None:
        magnitudes += dense.gate.square().sum(1)
    kept = choose_columns(dense.down, hidden, keep, solver, magnitudes)
    return Removal(without_units(dense, hidden, kept, refits(solver)), kept, hidden)


def without_units(dense: FeedForward, hidden: InputStatistics, kept: Tensor, refit: bool = True) -> FeedForward:
    """The smaller block with the kept units.

    Args:
        dense: the block.
        hidden: statistics of its hidden activation.
        kept: (f,) bool.
        refit: whether the down projection makes up for the others, see
            :func:`~sparsellm_lightning.solvers.refit_columns`.
    """
    down = refit_columns(dense.down, hidden, kept) if refit else dense.down[:, kept]
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
