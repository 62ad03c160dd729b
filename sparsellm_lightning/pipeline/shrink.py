"""Taking hidden units and heads out of one block: zeros in their place, which the others make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Attention, Linears, Network
from sparsellm_lightning.calibration import LayerSolver, feed_forward_of
from sparsellm_lightning.models import Shrinkage
from sparsellm_lightning.pipeline.block import BlockProblem
from sparsellm_lightning.reporting import BlockResult
from sparsellm_lightning.runtime import phase
from sparsellm_lightning.solvers import (
    InputStatistics,
    choose_columns,
    refit_columns,
    refits,
    remove_units,
    with_zeros,
)


def shrink_block(problem: BlockProblem, shrinkage: Shrinkage) -> BlockResult:
    """Set hidden units and heads of a block to zero, in place."""
    result = BlockResult(problem.block.index)
    attention = None if shrinkage.heads is None else problem.block.attention
    for unit in problem.block.units:
        if attention is not None and any(p.name == attention.output.name for p in unit.projections):
            assert shrinkage.heads is not None
            _remove_heads(problem, attention, shrinkage.heads, result)
        elif isinstance(unit, Network) and shrinkage.units is not None:
            _remove_units(problem, unit, shrinkage.units, result)
    return result


def _remove_heads(problem: BlockProblem, attention: Attention, keep: int, result: BlockResult) -> None:
    """Remove heads, and refit the output projection. Rows of queries, keys and values that nothing uses become zero."""
    adapter, solver, output = problem.context.adapter, problem.solver.name, attention.output
    inputs = problem.statistics(Linears([output]))
    with phase("local_solve"):
        dense = adapter.whole(output)
        others = {p.name: p for p in attention.projections if p.name != output.name}
        rows = {name: adapter.whole(p) for name, p in others.items()}
        size = output.shape[1] // attention.removable
        magnitudes = dense.square().sum(0).view(-1, size).sum(1)
        for p, first, count in attention.spans():
            squares = rows[p.name][first : first + count].square().sum(1)
            magnitudes += squares.view(attention.removable, -1).sum(1)
        kept = choose_columns(dense, inputs, keep, solver, magnitudes, size)
        columns = attention.columns(kept)
        weight = torch.zeros_like(dense)
        weight[:, columns] = refit_columns(dense, inputs, columns) if refits(solver) else dense[:, columns]
    adapter.write_whole(output, weight)
    for name, mask in attention.rows(kept).items():
        adapter.write_whole(others[name], rows[name] * mask[:, None])
    result.layer_errors[output.name] = _error(problem.solver, dense, weight, inputs)


def _remove_units(problem: BlockProblem, network: Network, keep: int, result: BlockResult) -> None:
    """Remove hidden units of a feed-forward network. The alternation then fits the smaller one, in which nothing is pruned."""
    context, cache, alternate = problem.context, problem.cache, problem.alternate
    dense, name = feed_forward_of(context, network), f"{problem.block.name}: "
    x, y = (problem.fitted_input(network), None) if alternate is None else problem.input_and_target(network)
    chunks = cache.chunks(cache.fitted)
    with phase("local_solve"):
        removal = remove_units(
            *(dense, x[: sum(chunks)], keep, problem.solver.name),
            damping=context.config.damping,
            ranks=context.ranks,
            chunks=chunks,
            name=name,
        )
    small, down = removal.small, network.roles["down"]
    if alternate is not None:

        def stored(rows: dict[str, Tensor], inputs: InputStatistics) -> dict[str, Tensor]:
            return {role: weight.to(down.parameter.dtype).float() for role, weight in rows.items()}

        with phase("alternation"):
            solution = alternate(small, x, y, stored, name=name, on_iteration=problem.on_iteration)
        small = solution.feed_forward
        result.errors, result.held_out_errors = solution.errors, solution.held_out_errors
    weights = with_zeros(small, removal.kept)
    for role, p in network.roles.items():
        context.adapter.write_whole(p, weights[role])
    result.layer_errors[down.name] = _error(problem.solver, dense.down, weights["down"], removal.hidden)


def _error(solver: LayerSolver, dense: Tensor, weight: Tensor, inputs: InputStatistics) -> float:
    """Relative error of a projection that is whole on every rank."""
    mine = solver.context.ranks.local_rows(len(dense))
    return solver.error(dense[mine], weight[mine], inputs)
