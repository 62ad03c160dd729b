"""The solve of projections that share one input: which solver, which pattern, and the rounding to the stored dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from sparsellm_lightning.architecture import Projection
from sparsellm_lightning.calibration.context import Context
from sparsellm_lightning.runtime import phase
from sparsellm_lightning.solvers import LOCAL_SOLVERS, InputStatistics, relative_error, solve_stacked


@dataclass(frozen=True)
class LayerSolver:
    """The local solver of a run.

    Args:
        context: of the run.
        sparsities: by projection name, where they differ from the setting.
        solver: name of the solver. None: the settings' one.
    """

    context: Context
    sparsities: Mapping[str, float] = field(default_factory=dict)
    solver: str | None = None

    @property
    def name(self) -> str:
        """Name of the solver."""
        config = self.context.config
        return self.solver or (config.local_solver if config.method == "sparsellm" else config.method)

    def prune(
        self,
        projections: Mapping[str, Projection],
        targets: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        inputs: InputStatistics,
        sparsity: float | None = None,
    ) -> dict[str, Tensor]:
        """Prune projections that share an input. Ignored ones stay dense.

        The result is rounded to the parameters' dtype, so that all later steps see the weights as they are stored.

        Args:
            projections: by any name.
            targets: by the same names, this rank's rows of the weights to approximate, (rows, columns) float32.
            dense: likewise, of the dense weights.
            inputs: statistics of the input.
            sparsity: of all these projections, instead of the one that each would get.
        """
        chosen = {name: target for name, target in targets.items() if projections[name].pruned}
        if not chosen or self.context.config.requested_sparsity == 0:
            return {name: dense[name] for name in targets}
        config, ranks = self.context.config, self.context.ranks
        patterns = {
            name: config.build_pattern(projections[name].shape[0], ranks, self._sparsity(projections[name], sparsity))
            for name in chosen
        }
        pruned_before = {name: dense[name] == 0 for name in chosen} if self.context.keep_zeros else None
        with phase("local_solve"):
            solved = solve_stacked(chosen, inputs, patterns, LOCAL_SOLVERS[self.name], pruned_before)
        stored = {name: rows.to(projections[name].parameter.dtype).float() for name, rows in solved.items()}
        return {name: dense[name] for name in targets} | stored

    def error(self, dense: Tensor, pruned: Tensor, inputs: InputStatistics) -> float:
        """``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`` over all ranks, from this rank's rows of W and Ŵ."""
        with phase("local_solve"):
            return relative_error(dense, pruned, inputs.gram, self.context.ranks)

    def _sparsity(self, projection: Projection, sparsity: float | None) -> float | None:
        return self.sparsities.get(projection.name) if sparsity is None else sparsity
