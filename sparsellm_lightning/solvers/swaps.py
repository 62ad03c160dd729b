"""Refining a mask by 1-swaps (after Zimmer et al., SparseSwaps, arXiv 2512.10922): a kept weight of a row makes way for a
pruned one, where the Gram matrix of the inputs says that it pays. There weights keep their dense values; here they move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsellm_lightning.solvers.admm import solve_on_support
from sparsellm_lightning.stopwatch import count

_TOLERANCE = 1e-6  # of a row's loss: what a swap must gain at least, lest float32 rounding is taken for a gain
_TOGETHER = 2**20  # entries or pairs of a block of rows, which bounds the memory; larger ones are slower on a CPU

_BestSwap = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def swap_refine(
    weight: Tensor,
    target: Tensor,
    gram: Tensor,
    damping: float,
    keep: Tensor,
    group: int = 1,
    swaps: int = 10,
    candidates: int | None = 16,
    rounds: int = 3,
    refinements: int = 10,
) -> tuple[Tensor, Tensor]:
    """Lower ``L(W) = ⟨(W − Ŵ) H, W − Ŵ⟩``, ``H = G + λI``, by exchanging kept entries for pruned ones within rows.

    With ``g = (W − Ŵ) H``, a row's entry p going to zero and q coming in at its best value changes the loss by

        Δ(p, q) = −2 W_p g_p + W_p² H_pp − (g_q − W_p H_pq)² / H_qq,    W_q = −(g_q − W_p H_pq) / H_qq

    while the others stay. A sweep makes the best swap of every row and updates g. A round is some sweeps, then
    conjugate-gradient steps on the new support; rounds end when none of the swaps gains. In exact arithmetic no step raises
    the loss of any row. As many entries as before are kept in every row, and group; rows do not depend on each other.

    Features that were zero for every token carry no information: their weights become zero, and they never enter.

    Args:
        weight: W to begin with, (rows, columns) float32; what is not kept counts as zero. Not changed.
        target: Ŵ, the weight to be approximated, like ``weight``.
        gram: G, of the inputs, (columns, columns) float32.
        damping: λ, as a fraction of G's mean diagonal.
        keep: the mask to begin with, (rows, columns) bool, True = kept. Not changed.
        group: consecutive columns, a divisor of their number, within which p and q must both lie; 1 = anywhere in the row.
        swaps: per row and round, at most.
        candidates: so many kept entries, of lowest ``−2 W_p g_p + W_p² H_pp``, are paired with so many pruned ones, of highest
            ``g_q² / H_qq``; None = all pairs, as always within groups.
        rounds: at most; with none the kept weights are solved for on the mask given.
        refinements: conjugate-gradient steps a round.

    Returns:
        the pruned weight and its mask, new tensors.
    """
    h = gram.clone()
    h.diagonal().add_(damping * gram.diagonal().mean())
    dead = gram.diagonal() <= 0
    h.diagonal()[dead] = 1
    # A unit diagonal: H_pp and H_qq drop out of every formula, and the conjugate gradients converge sooner.
    scale = h.diagonal().sqrt()
    h /= scale[:, None] * scale
    dense = (target * scale).masked_fill_(dead, 0)
    w = (weight * scale).masked_fill_(dead | ~keep, 0)
    keep = keep.clone()
    wanted = dense @ h
    count(2 * w.numel() * len(h))
    if not rounds:
        w = solve_on_support(w, wanted, h, keep, refinements)
    for _ in range(rounds):
        before = keep.clone()
        _swap(w, dense, h, keep, dead, group, swaps, candidates)
        w = solve_on_support(w, wanted, h, keep, refinements)
        if torch.equal(keep, before):
            break
    return w / scale, keep


def _swap(
    w: Tensor, dense: Tensor, h: Tensor, keep: Tensor, dead: Tensor, group: int, swaps: int, candidates: int | None
) -> None:
    """Swap in place, in ``w`` and ``keep``, under an h of unit diagonal; blocks of rows one after the other."""
    columns = w.shape[1]
    count(2 * w.numel() * columns)
    best: _BestSwap
    if group > 1 or candidates is None:
        best, size = _best_in_groups, group if group > 1 else columns
        pairs = columns * size
    else:
        best, size = _best_of_candidates, min(candidates, columns)
        pairs = size**2
    block = max(_TOGETHER // max(pairs, columns), 1)
    for w_b, dense_b, keep_b in zip(w.split(block), dense.split(block), keep.split(block), strict=True):
        g = (w_b - dense_b) @ h
        least = -_TOLERANCE * ((w_b - dense_b) * g).sum(1, keepdim=True)
        for _ in range(swaps):
            cost = (w_b * (w_b - 2 * g)).masked_fill_(~keep_b, torch.inf)
            change, p, q = best(cost, w_b, g, ~(keep_b | dead), h, size)
            gains = change < least
            if not bool(gains.any()):
                break
            w_p = w_b.gather(1, p)
            w_q = torch.where(gains, w_p * h[p, q] - g.gather(1, q), 0)
            w_p = torch.where(gains, w_p, 0)
            w_b.scatter_add_(1, p, -w_p).scatter_add_(1, q, w_q)
            keep_b.scatter_(1, p, keep_b.gather(1, p) & ~gains).scatter_(1, q, keep_b.gather(1, q) | gains)
            g.addcmul_(w_p, h[p[:, 0]], value=-1).addcmul_(w_q, h[q[:, 0]])


def _best_of_candidates(
    cost: Tensor, w: Tensor, g: Tensor, enters: Tensor, h: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Δ, p and q, (rows, 1) each, of the best pair of a row's cheapest kept and most wanted pruned entries.

    Args:
        cost: of taking an entry out, (rows, columns), infinite where it is not kept.
        w: the weights.
        g: their difference from the dense ones, times h.
        enters: bool, which entries may come in.
        h: of unit diagonal, (columns, columns).
        candidates: of either kind.
    """
    cost_p, p = cost.topk(candidates, largest=False, sorted=False)
    wish, q = g.square().masked_fill_(~enters, -torch.inf).topk(candidates, sorted=False)
    entering = g.gather(1, q)[:, None, :] - w.gather(1, p)[:, :, None] * h[p[:, :, None], q[:, None, :]]
    gain = entering.square_().masked_fill_((wish < 0)[:, None, :], -torch.inf)
    change, index = (cost_p[:, :, None] - gain).flatten(1).min(1, keepdim=True)
    return change, p.gather(1, index // candidates), q.gather(1, index % candidates)


def _best_in_groups(
    cost: Tensor, w: Tensor, g: Tensor, enters: Tensor, h: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_best_of_candidates`, of all pairs within groups of so many columns."""
    cost, w, g, enters = (tensor.unflatten(1, (-1, group)) for tensor in (cost, w, g, enters))
    within = h.unflatten(0, (-1, group)).unflatten(2, (-1, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    entering = g[:, :, None, :] - w[:, :, :, None] * within
    gain = entering.square_().masked_fill_(~enters[:, :, None, :], -torch.inf)
    change, index = (cost[:, :, :, None] - gain).flatten(1).min(1, keepdim=True)
    first = index // group**2 * group
    return change, first + index // group % group, first + index % group
