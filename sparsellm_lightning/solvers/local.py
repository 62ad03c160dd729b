"""The local solvers behind one signature, and the solve of several matrices that share their input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from sparsellm_lightning.solvers.admm import admm
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.magnitude import magnitude
from sparsellm_lightning.solvers.patterns import Containing, Pattern, Stacked
from sparsellm_lightning.solvers.sparsegpt import sparsegpt
from sparsellm_lightning.solvers.statistics import InputStatistics
from sparsellm_lightning.solvers.wanda import wanda

Key = TypeVar("Key", bound=Hashable)

LocalSolver = Callable[[Tensor, InputStatistics, Pattern], Tensor]
"""(Ŵ (rows, columns) float32, statistics of the input, pattern) -> the pruned weight, a new tensor."""

LOCAL_SOLVERS: dict[str, LocalSolver] = {
    "magnitude": lambda weight, inputs, pattern: magnitude(weight, pattern),
    "wanda": lambda weight, inputs, pattern: wanda(weight, inputs.gram, pattern),
    "admm": lambda weight, inputs, pattern: admm(weight, inputs.gram, inputs.damping, pattern),
    "sparsegpt": lambda weight, inputs, pattern: sparsegpt(weight, inputs.factor, pattern),
}
_CORRECTING = (LOCAL_SOLVERS["admm"], LOCAL_SOLVERS["sparsegpt"])  # change kept weights
_SAMPLE = (
    64  # smallest number of rows per matrix in the first comparison with magnitude pruning. A smaller matrix: all rows
)
_CLEARLY = (
    0.9  # if errors on sampled rows are at most this fraction of magnitude pruning's, other rows are not compared
)


def solve_stacked(
    targets: Mapping[Key, Tensor],
    inputs: InputStatistics,
    patterns: Mapping[Key, Pattern],
    solver: LocalSolver,
    pruned_before: Mapping[Key, Tensor] | None = None,
) -> dict[Key, Tensor]:
    """Solve matrices that share one input as one stack of rows. The factorisation is made once, masks are chosen by matrix.

    Args:
        targets: this rank's rows of each Ŵ, (rows, columns) float32.
        inputs: statistics of the shared input.
        patterns: of each matrix.
        solver: one of :data:`LOCAL_SOLVERS`.
        pruned_before: bool masks, like ``targets``. Entries that are True are pruned first (gradual pruning).

    Returns:
        the pruned rows of each matrix, by magnitude where the input was zero for every token. The error of ``admm`` and
        ``sparsegpt`` is at most that of magnitude pruning, in matrices of 128 rows and more judged by a sample of the rows.
    """
    sizes = [len(target) for target in targets.values()]
    if pruned_before is not None:
        patterns = {name: Containing(patterns[name], pruned_before[name]) for name in targets}
    pattern = Stacked([patterns[name] for name in targets], sizes)
    stacked = torch.cat(list(targets.values()))
    if not bool(inputs.gram.diagonal().any()):  # all masks have error 0, and ties would be broken by position
        solver = LOCAL_SOLVERS["magnitude"]
    solved = solver(stacked, inputs, pattern)
    if solver in _CORRECTING:
        solved = _at_most_magnitude(solved, stacked, inputs, pattern, sizes)
    return dict(zip(targets, solved.split(sizes), strict=True))


def _at_most_magnitude(
    solved: Tensor, target: Tensor, inputs: InputStatistics, pattern: Pattern, sizes: list[int]
) -> Tensor:
    """The solution, replaced by magnitude pruning in each matrix where magnitude pruning has less error ``‖(Ŵ − W) H^{1/2}‖``.

    SparseGPT is greedy and ADMM is not convex: on small matrices with strongly correlated inputs, magnitude pruning can be
    better. The errors on a sample of rows (all rows of a small matrix) decide whether errors on all rows are computed.

    Args:
        solved: of all matrices, stacked by rows.
        target: Ŵ, likewise.
        inputs: statistics of the shared input.
        pattern: of the stack.
        sizes: number of rows of each matrix.
    """
    starts = accumulate(sizes, initial=0)
    sampled = [range(start, start + size, max(size // _SAMPLE, 1)) for start, size in zip(starts, sizes, strict=False)]
    rows = torch.tensor([row for part in sampled for row in part], dtype=torch.long, device=target.device)
    counts = [len(part) for part in sampled]
    errors = _errors(solved[rows], target[rows], inputs, pattern.of_rows(rows, counts), counts)[0]
    if bool((errors[0] <= _CLEARLY * errors[1]).all()):
        return solved
    errors, plain = _errors(solved, target, inputs, pattern, sizes)
    worse = errors[0] > errors[1]
    if not bool(worse.any()):
        return solved
    return torch.where(worse.repeat_interleave(torch.tensor(sizes, device=worse.device))[:, None], plain, solved)


def _errors(
    solved: Tensor, target: Tensor, inputs: InputStatistics, pattern: Pattern, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """``‖(Ŵ − W) H^{1/2}‖²`` of each matrix for the solution and for magnitude pruning, (2, matrices); magnitude's weights.

    Weights of inputs that were zero for every token cost nothing, as in the solvers, although λ stands in their place in H.
    """
    plain, dead = magnitude(target, pattern), inputs.gram.diagonal() <= 0
    damping = float(inputs.damping * inputs.gram.diagonal().mean())
    errors = target.new_empty(2, len(sizes), dtype=torch.float64)
    for row, candidate in enumerate((solved, plain)):
        difference = (target - candidate).masked_fill_(dead, 0)
        count(2 * difference.numel() * len(inputs.gram))
        image = torch.addmm(difference, difference, inputs.gram, beta=damping)
        # In float64, because float32 would overflow for large weights of large inputs.
        by_row = (image.to(errors.dtype) * difference).sum(1)
        errors[row] = torch.stack([part.sum() for part in by_row.split(sizes)])
    pattern.ranks.sum_(errors)
    return errors, plain
