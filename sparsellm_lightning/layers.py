"""Pruning the projections that share one input, by the local solver, to the sparsity that each of them gets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Projection
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.patterns import Containing, Pattern, Stacked
from sparsellm_lightning.solvers.local import LOCAL_SOLVERS, InputStatistics, refined
from sparsellm_lightning.statistics import relative_error
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter


class LayerPruner:
    """The local solver, as the settings say.

    Args:
        config: settings.
        adapter: of the strategy the model runs under.
        stopwatch: gets the seconds.

    Attributes:
        sparsities: by projection name, where they differ from the settings' one (see
            :mod:`~sparsellm_lightning.allocation`).
    """

    def __init__(self, config: PruningConfig, adapter: StrategyAdapter, stopwatch: Stopwatch) -> None:
        self.config, self.adapter, self.stopwatch = config, adapter, stopwatch
        self.name = config.local_solver if config.method == "sparsellm" else config.method
        self.solve = LOCAL_SOLVERS[self.name]
        self.sparsities: dict[str, float] = {}

    def prune(
        self,
        projections: Mapping[str, Projection],
        targets: dict[str, Tensor],
        dense: dict[str, Tensor],
        inputs: InputStatistics,
        sparsity: float | None = None,
    ) -> dict[str, Tensor]:
        """Prune projections that share an input, stacked by rows; those to be skipped stay dense.

        The result is rounded to what the parameters can hold, so that all that follows sees the weights as they will be stored.

        Args:
            projections: by any name.
            targets: by the same names, this rank's rows of the weights to be approximated, (rows, columns) float32.
            dense: likewise, the dense weights.
            inputs: statistics of the input.
            sparsity: instead of the one that each projection would get.
        """
        chosen = [name for name in targets if projections[name].pruned]
        if not chosen or self.config.requested_sparsity == 0:
            return {name: dense[name] for name in targets}
        sizes = [targets[name].shape[0] for name in chosen]
        weight = torch.cat([targets[name] for name in chosen])
        patterns = [self._pattern(projections[name], sparsity) for name in chosen]
        pattern: Pattern = Stacked(patterns, sizes)
        if self.config.keep_zeros:
            pattern = Containing(pattern, torch.cat([dense[name] for name in chosen]) == 0)
        with self.stopwatch.phase("local_solve"):
            solved = self.solve(weight, inputs, pattern, self.config.block_size)
            solved = refined(solved, weight, inputs, pattern, self.config.refine, self.config.keep_zeros)
        stored = {
            name: part.to(projections[name].parameter.dtype).float()
            for name, part in zip(chosen, solved.split(sizes), strict=True)
        }
        return {name: dense[name] for name in targets} | stored

    def error(self, dense: Tensor, pruned: Tensor, inputs: InputStatistics) -> float:
        """``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`` over all ranks, of this rank's rows."""
        with self.stopwatch.phase("local_solve"):
            parts = torch.stack(relative_error(dense, pruned, inputs.gram)).double()
        self.adapter.ranks.sum_(parts)
        return float(parts[0] / parts[1]) if parts[1] > 0 else 0.0

    def _pattern(self, projection: Projection, sparsity: float | None) -> Pattern:
        if sparsity is None:
            sparsity = self.sparsities.get(projection.name)
        return self.config.build_pattern(projection.shape[0], self.adapter.ranks, sparsity)
