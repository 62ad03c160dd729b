"""The local solvers behind one signature, and the solve of several matrices that share their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsellm_lightning.solvers.admm import admm
from sparsellm_lightning.solvers.magnitude import magnitude
from sparsellm_lightning.solvers.patterns import Containing, Pattern, Stacked
from sparsellm_lightning.solvers.sparsegpt import sparsegpt
from sparsellm_lightning.solvers.statistics import InputStatistics
from sparsellm_lightning.solvers.wanda import wanda

LocalSolver = Callable[[Tensor, InputStatistics, Pattern], Tensor]
"""(Ŵ (rows, columns) float32, statistics of the input, pattern) -> the pruned weight, a new tensor."""

LOCAL_SOLVERS: dict[str, LocalSolver] = {
    "magnitude": lambda weight, inputs, pattern: magnitude(weight, pattern),
    "wanda": lambda weight, inputs, pattern: wanda(weight, inputs.gram, pattern),
    "admm": lambda weight, inputs, pattern: admm(weight, inputs.gram, inputs.damping, pattern),
    "sparsegpt": lambda weight, inputs, pattern: sparsegpt(weight, inputs.factor, pattern),
}


def solve_stacked(
    targets: Mapping[str, Tensor],
    inputs: InputStatistics,
    patterns: Mapping[str, Pattern],
    solver: LocalSolver,
    pruned_before: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Solve matrices that share one input as one stack of rows. The factorisation is made once, masks are chosen by matrix.

    Args:
        targets: this rank's rows of each Ŵ, (rows, columns) float32.
        inputs: statistics of the shared input.
        patterns: of each matrix.
        solver: one of :data:`LOCAL_SOLVERS`.
        pruned_before: bool masks, like ``targets``. Entries that are True are pruned first (gradual pruning).

    Returns:
        the pruned rows of each matrix.
    """
    sizes = [len(target) for target in targets.values()]
    pattern: Pattern = Stacked([patterns[name] for name in targets], sizes)
    if pruned_before is not None:
        pattern = Containing(pattern, torch.cat([pruned_before[name] for name in targets]))
    solved = solver(torch.cat(list(targets.values())), inputs, pattern)
    return dict(zip(targets, solved.split(sizes), strict=True))
