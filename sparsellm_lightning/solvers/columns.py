"""Groups of columns of a matrix: which to remove, and the other columns that make up for them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm_lightning.solvers.factorization import factorize
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.statistics import InputStatistics

_STEPS = 512  # largest number of times that the scores are computed anew
_RAISES = 8  # of a diagonal, by a factor of 10


def choose_columns(
    weight: Tensor, inputs: InputStatistics, keep: int, solver: str, magnitudes: Tensor, size: int = 1
) -> Tensor:
    """Groups of ``size`` neighbouring columns to keep, by the criterion of a local solver.

    ``magnitude``: the largest ``magnitudes``. ``wanda``: the largest sums of ``|W_ij| ‖x_j‖`` (Wanda-sp). ``sparsegpt`` and
    ``admm``: groups are removed one after the other, each the one whose loss the others compensate best (:func:`surgeon`).
    Where the input is zero, all go by ``magnitudes``.

    Args:
        weight: W, (rows, columns) float32, whole.
        inputs: statistics of its input.
        keep: number of groups to keep.
        solver: name.
        magnitudes: (columns / size,), scores of the groups for ``magnitude``.
        size: of a group.

    Returns:
        (columns / size,) bool, True = kept.
    """
    if not bool(inputs.gram.diagonal().any()):
        solver = "magnitude"  # all other scores would be equal
    if refits(solver):
        groups = weight.shape[1] // size
        order, _ = surgeon(weight, inputs, groups - keep, size)
        return torch.ones(groups, dtype=torch.bool, device=weight.device).index_fill_(0, order, False)
    if solver == "wanda":
        magnitudes = (weight.abs().sum(0) * inputs.gram.diagonal().clamp(min=0).sqrt()).view(-1, size).sum(1)
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[magnitudes.argsort(descending=True, stable=True)[:keep]] = True
    return kept


def refits(solver: str) -> bool:
    """Whether a solver changes the columns that are left."""
    return solver in ("sparsegpt", "admm")


def surgeon(
    weight: Tensor, inputs: InputStatistics, remove: int, size: int = 1
) -> tuple[Tensor, list[tuple[int, float]]]:
    """The order in which optimal brain surgeon removes groups of columns, and the error after each step.

    With ``H = XᵀX / n + λI``, the squared error of removing the columns j, the others making up for it as well as they can, is

        ``tr(W_j ((H⁻¹)_jj)⁻¹ W_jᵀ)``

    Then ``W −= W_j ((H⁻¹)_jj)⁻¹ (H⁻¹)_j``, and the same for ``H⁻¹`` (ZipLM, arXiv 2302.04089). To remove more than 512 groups,
    512 steps remove one or several each, by scores that ignore what else the step removes.

    Args:
        weight: W, (rows, columns) float32.
        inputs: statistics of its input, whose damping gives λ.
        remove: number of groups to remove.
        size: number of columns in a group.

    Returns:
        (remove,) int64 indices of the groups in order of removal; and after each step the pair (number of groups removed so
        far, squared error ``‖X(W − Ŵ)ᵀ‖² / n + λ‖W − Ŵ‖²`` of the compensated Ŵ). The first pair is (0, 0.0).
    """
    upper = inputs.factor.upper
    inverse, weight = upper.T @ upper, weight.masked_fill(inputs.factor.dead, 0)
    groups = torch.arange(len(inverse), device=weight.device).view(-1, size)
    left = torch.ones(len(groups), dtype=torch.bool, device=weight.device)
    order, errors = [], [(0, 0.0)]
    for step in range(min(_STEPS, remove)):
        together = remove * (step + 1) // min(_STEPS, remove) - remove * step // min(_STEPS, remove)
        scores = torch.full(left.shape, torch.inf, device=weight.device)
        scores[left] = _losses(weight, inverse, groups[left])
        leaving = scores.topk(together, largest=False).indices
        left[leaving] = False
        order.append(leaving)
        columns = groups[leaving].flatten()
        solved = _solve(inverse[columns][:, columns], torch.cat([inverse[columns], weight[:, columns].T], 1))
        solved, compensated = solved.split([len(inverse), len(weight)], 1)
        errors.append((errors[-1][0] + together, errors[-1][1] + float((weight[:, columns] * compensated.T).sum())))
        weight -= weight[:, columns] @ solved
        inverse -= inverse[:, columns] @ solved
        count(2 * len(columns) * (weight.numel() + inverse.numel()))
    return torch.cat(order) if order else left.new_zeros(0, dtype=torch.long), errors


def _losses(weight: Tensor, inverse: Tensor, groups: Tensor) -> Tensor:
    """Squared error of removing each group, (groups,). ``groups`` has the columns of each, (groups, size)."""
    if groups.shape[1] == 1:
        columns = groups.flatten()
        return weight.square().sum(0)[columns] / inverse.diagonal()[columns].clamp(min=1e-30)
    blocks = inverse[groups[:, :, None], groups[:, None, :]]
    parts = weight.T[groups]
    return (parts * _solve(blocks, parts)).sum((1, 2))


def _solve(blocks: Tensor, right: Tensor) -> Tensor:
    """``B⁻¹ R`` for positive definite (..., k, k) blocks, whose diagonals are raised where rounding has made them indefinite.

    By Cholesky, not ``torch.linalg.solve``: with several threads MKL's LU of a batch of 192 columns never returns.
    """
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True).abs().clamp(min=1e-30)
    raised = torch.zeros_like(scale)
    for _ in range(_RAISES):
        lower, info = torch.linalg.cholesky_ex(blocks + torch.diag_embed(raised.expand_as(diagonal)))
        failed = (info > 0)[..., None]
        if not bool(failed.any()):
            break
        raised = torch.where(failed, (10 * raised).clamp(min=1e-6 * scale), raised)
    return torch.cholesky_solve(right, lower)


def refit_columns(weight: Tensor, inputs: InputStatistics, kept: Tensor) -> Tensor:
    """The kept columns K, refitted to give the output best without the removed columns R, (rows, |K|).

    With ``H = XᵀX / n + λI`` they are ``W_K + W_R H_RK (H_KK)⁻¹``.

    Args:
        weight: W, (rows, columns) float32.
        inputs: statistics of its input, whose damping gives λ.
        kept: (columns,) bool.
    """
    gram = inputs.gram[kept][:, kept]
    # λ stays that of the whole matrix.
    damping = inputs.damping * float(inputs.gram.diagonal().mean()) / (float(gram.diagonal().mean()) or 1.0)
    factor = factorize(gram, damping, inputs.name)
    count(2 * weight.shape[0] * inputs.gram.numel())
    return weight[:, kept] + factor.solve(weight[:, ~kept] @ inputs.gram[~kept][:, kept])
