"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune column by column, correct the columns to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.patterns import Pattern
from sparsellm_lightning.statistics import Factor

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
        pattern: which entries to keep; thresholds over the rows of all ranks are its business.
        block_size: columns per mask decision; rounded to whole groups for N:M.

    Returns:
        the pruned weight, a new tensor.
    """
    rows, columns = weight.shape
    upper = factor.upper
    # Columns of W are rows here, so that the sweep reads and writes contiguous memory; padded, since the kernels for an odd
    # number of rows round otherwise, and rows spread over ranks must come out as they do on one.
    w = weight.new_zeros(columns, -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    w[:, :rows] = weight.T
    w[factor.dead] = 0
    diagonal = upper.diagonal()
    cost_scale = diagonal.pow(-2)
    whole_groups = _whole_groups(block_size, pattern.group)
    leaf = _whole_groups(_LEAF, pattern.group)

    for low in range(0, columns, whole_groups):
        high = min(low + whole_groups, columns)
        errors = torch.empty_like(w[low:high])
        ratio = torch.zeros_like(errors)  # error W_ri / U_ii of an entry by its value: 0 where it is kept

        def choose(start: int, end: int, low: int = low, ratio: Tensor = ratio) -> None:
            cost = (w[start:end, :rows].square() * cost_scale[start:end, None]).T.contiguous()
            pruned = ~pattern.select(cost, first_column=start).T
            torch.div(pruned, diagonal[start:end, None], out=ratio[start - low : end - low, :rows])

        def sweep(
            start: int, end: int, low: int = low, errors: Tensor = errors, ratio: Tensor = ratio, choose: Any = choose
        ) -> None:
            """Correct for columns [start, end); halves are chained by one product instead of column by column."""
            if end - start > leaf:
                middle = start + _whole_groups((end - start) // 2, pattern.group)
                sweep(start, middle)
                w[middle:end].addmm_(upper[start:middle, middle:end].T, errors[start - low : middle - low], alpha=-1)
                sweep(middle, end)
                return
            for i in range(start, end):
                if pattern.group > 1 and i % pattern.group == 0:
                    choose(i, i + pattern.group)
                torch.mul(w[i], ratio[i - low], out=errors[i - low])
                if i + 1 < end:
                    w[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i - low], alpha=-1)

        if pattern.group == 1:
            choose(low, high)
        sweep(low, high)
        w[low:high].masked_fill_(ratio != 0, 0)
        if high < columns:
            w[high:].addmm_(upper[low:high, high:].T, errors, alpha=-1)
    return w[:, :rows].T.contiguous()


def _whole_groups(columns: int, group: int) -> int:
    """The largest multiple of ``group`` that is at most ``columns``, but at least one group."""
    return max(columns // group, 1) * group
