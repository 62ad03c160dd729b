"""The solve of projections that share one input: which solver, which pattern, and the rounding to the stored dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Network, Projection
from sparsellm_lightning.calibration.context import Context
from sparsellm_lightning.runtime import phase
from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    FeedForward,
    InputStatistics,
    Pattern,
    relative_error,
    solve_stacked,
)


def feed_forward_of(context: Context, network: Network) -> FeedForward:
    """The network's weights and biases as they are in the model, whole on every rank, float32."""
    weights = {role: context.adapter.whole(p) for role, p in network.roles.items()}
    biases = {f"{role}_bias": context.adapter.whole_bias(p) for role, p in network.roles.items()}
    if network.up_offset:
        bias = biases["up_bias"]
        biases["up_bias"] = network.up_offset + (weights["up"].new_zeros(len(weights["up"])) if bias is None else bias)
    limit, offset = network.up_limit, network.up_offset
    bounds = None if limit is None else (offset - limit, offset + limit)
    return FeedForward(network.activation, **weights, **biases, up_bounds=bounds)  # type: ignore[arg-type]


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
        parts: dict[tuple[str, int], Tensor] = {}
        patterns: dict[tuple[str, int], Pattern] = {}
        before: dict[tuple[str, int], Tensor] | None = {} if self.context.keep_zeros else None
        for name, target in chosen.items():
            share = self.sparsities.get(projections[name].name) if sparsity is None else sparsity
            for part, (rows, first_row, size) in enumerate(self._parts(projections[name])):
                parts[name, part] = target[rows]
                patterns[name, part] = self.context.config.build_pattern(
                    size, self.context.ranks, share, first_row if projections[name].parts else None
                )
                if before is not None:
                    before[name, part] = dense[name][rows] == 0
        with phase("local_solve"):
            solved = solve_stacked(parts, inputs, patterns, LOCAL_SOLVERS[self.name], before)
        stored = {
            name: torch.cat([rows for (of, _), rows in solved.items() if of == name])
            .to(projections[name].parameter.dtype)
            .float()
            for name in chosen
        }
        return {name: dense[name] for name in targets} | stored

    def _parts(self, projection: Projection) -> Iterator[tuple[slice, int, int]]:
        """For each matrix of a projection (``Projection.parts``): its slice of this rank's rows, the position in the matrix of
        the first of these rows, and the number of rows of the whole matrix.
        """
        mine, start = self.context.ranks.local_rows(projection.shape[0]), 0
        for size in projection.parts or (projection.shape[0],):
            low, high = max(mine.start, start), min(mine.stop, start + size)
            yield slice(max(low - mine.start, 0), max(high - mine.start, 0)), max(low - start, 0), size
            start += size

    def error(self, dense: Tensor, pruned: Tensor, inputs: InputStatistics) -> float:
        """``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`` over all ranks, from this rank's rows of W and Ŵ."""
        with phase("local_solve"):
            return relative_error(dense, pruned, inputs.gram, self.context.ranks)
