"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune column by column, correct the columns to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsellm_lightning.solvers.factorization import Factor
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.patterns import Pattern

_LEAF = 32
_ROW_MULTIPLE = 32


def sparsegpt(weight: Tensor, factor: Factor, pattern: Pattern, block_size: int = 128) -> Tensor:
    """Approximately minimise ``‖(W − Ŵ) H^{1/2}‖`` over W in the pattern, by one sweep over the columns.

    With ``H⁻¹ = UᵀU``, pruning entry (r, i) costs ``W_ri² / U_ii²`` and moves the rest of its row by
    ``−W_ri / U_ii · U_i,i+1:`` (the paper's equations 3 and 4). The mask is chosen on that cost, for ``block_size``
    columns at a time (unstructured) or per group (N:M), with the corrections so far applied.

    Args:
        weight: Ŵ, (rows, columns) float32; this rank's rows. Not changed.
        factor: of the damped Gram matrix of the inputs, (columns, columns).
        pattern: chooses the entries to keep. Its ``ranks`` hold the other rows.
        block_size: columns per lazy update and, if unstructured, per mask decision. Rounded to whole groups for N:M.

    Returns:
        the pruned weight, a new tensor.
    """
    rows, columns = weight.shape
    count(rows * columns**2)
    upper = factor.upper
    # Transposed, so that the sweep reads and writes contiguous memory. Padded, because kernels round differently for an odd
    # number of rows, and one and many ranks must get equal weights.
    w = weight.new_zeros(columns, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    w[:, :rows] = weight.T
    diagonal = upper.diagonal()
    cost_scale = diagonal.pow(-2).masked_fill_(factor.dead, 0)  # dead inputs cost nothing, so they are pruned first
    whole_groups = _whole_groups(block_size, pattern.group)
    leaf = _whole_groups(_LEAF, pattern.group)

    for low in range(0, columns, whole_groups):
        high = min(low + whole_groups, columns)
        errors = torch.empty_like(w[low:high])
        ratio = torch.zeros_like(errors)  # an entry's error W_ri / U_ii divided by W_ri; 0 where the entry is kept

        def choose(start: int, end: int, low: int = low, ratio: Tensor = ratio) -> None:
            cost = (w[start:end, :rows].square() * cost_scale[start:end, None]).T.contiguous()
            pruned = ~pattern.select(cost, first_column=start).T
            torch.div(pruned, diagonal[start:end, None], out=ratio[start - low : end - low, :rows])

        if pattern.group == 1:
            choose(low, high)
        _sweep(w[low:high], upper[low:high, low:high], errors, ratio, pattern.group, leaf, choose, low)
        w[low:high].masked_fill_(ratio != 0, 0)
        if high < columns:
            w[high:].addmm_(upper[low:high, high:].T, errors, alpha=-1)
    return w[:, :rows].T.contiguous()


def _sweep(
    w: Tensor,
    upper: Tensor,
    errors: Tensor,
    ratio: Tensor,
    group: int,
    leaf: int,
    choose: Callable[[int, int], None],
    first: int,
) -> None:
    """Correct columns for the errors of the columns before them. Recursive by halves, which are chained by one product.

    A module-level function, because a recursive closure would keep its tensors until the garbage collector runs.

    Args:
        w: the columns of W, as rows. Changed in place.
        upper: the rows and columns of U that belong to them.
        errors: output, like w.
        ratio: like w, an entry's error divided by the entry.
        group: number of columns that ``choose(start, end)`` decides together when the sweep reaches them. 1: already decided.
        leaf: largest number of columns that are corrected one by one.
        choose: decides the mask of columns ``start`` to ``end`` and writes ``ratio``.
        first: index of the first column in the whole matrix.
    """
    columns = len(w)
    if columns > leaf:
        middle = _whole_groups(columns // 2, group)
        low, high = slice(middle), slice(middle, None)
        _sweep(w[low], upper[low, low], errors[low], ratio[low], group, leaf, choose, first)
        w[high].addmm_(upper[low, high].T, errors[low], alpha=-1)
        _sweep(w[high], upper[high, high], errors[high], ratio[high], group, leaf, choose, first + middle)
        return
    for i in range(columns):
        if group > 1 and i % group == 0:
            choose(first + i, first + i + group)
        torch.mul(w[i], ratio[i], out=errors[i])
        if i + 1 < columns:
            w[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)


def _whole_groups(columns: int, group: int) -> int:
    """The largest multiple of ``group`` that is at most ``columns``, but at least one group."""
    return max(columns // group, 1) * group
