"""Taking hidden units and heads out of one block: zeros in their place, which the others make up for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Attention, Block, Linears, Network
from sparsellm_lightning.calibration import ActivationCache, Context, LayerSolver, feed_forward_of
from sparsellm_lightning.models import Shrinkage
from sparsellm_lightning.pipeline.block import (
    Alternate,
    FeedForwardTarget,
    calibrate,
    feed_forward_data,
    fitted_input,
)
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


def shrink_block(
    context: Context,
    solver: LayerSolver,
    shrinkage: Shrinkage,
    block: Block,
    cache: ActivationCache,
    alternate: Alternate | None = None,
    target: FeedForwardTarget | None = None,
    on_iteration: Callable[[int, float], None] | None = None,
) -> BlockResult:
    """Set units and heads of a block to zero, in place.

    For arguments see :func:`~sparsellm_lightning.pipeline.block.solve_block`. The alternation fits the smaller network, in
    which nothing is pruned.
    """
    result = BlockResult(block.index)
    attention = None if shrinkage.heads is None else block.attention
    for unit in block.units:
        if attention is not None and any(p.name == attention.output.name for p in unit.projections):
            assert shrinkage.heads is not None
            _remove_heads(context, solver, block, attention, cache, shrinkage.heads, result)
        elif isinstance(unit, Network) and shrinkage.units is not None:
            _remove_units(context, solver, block, unit, cache, shrinkage.units, alternate, target, on_iteration, result)
    return result


def _remove_heads(
    context: Context,
    solver: LayerSolver,
    block: Block,
    attention: Attention,
    cache: ActivationCache,
    keep: int,
    result: BlockResult,
) -> None:
    """Remove heads, and refit the output projection. Rows of queries, keys and values that nothing uses become zero."""
    output = attention.output
    inputs = calibrate(context, block, cache, Linears([output]))
    with phase("local_solve"):
        dense = context.adapter.whole(output)
        others = {p.name: p for p in attention.projections if p.name != output.name}
        rows = {name: context.adapter.whole(p) for name, p in others.items()}
        size = output.shape[1] // attention.removable
        magnitudes = dense.square().sum(0).view(-1, size).sum(1)
        for p, first, count in attention.spans():
            squares = rows[p.name][first : first + count].square().sum(1)
            magnitudes += squares.view(attention.removable, -1).sum(1)
        kept = choose_columns(dense, inputs, keep, solver.name, magnitudes, size)
        columns = attention.columns(kept)
        weight = torch.zeros_like(dense)
        weight[:, columns] = refit_columns(dense, inputs, columns) if refits(solver.name) else dense[:, columns]
    context.adapter.write_whole(output, weight)
    for name, mask in attention.rows(kept).items():
        context.adapter.write_whole(others[name], rows[name] * mask[:, None])
    result.layer_errors[output.name] = _error(context, solver, dense, weight, inputs)


def _remove_units(
    context: Context,
    solver: LayerSolver,
    block: Block,
    network: Network,
    cache: ActivationCache,
    keep: int,
    alternate: Alternate | None,
    target: FeedForwardTarget | None,
    on_iteration: Callable[[int, float], None] | None,
    result: BlockResult,
) -> None:
    """Remove hidden units of a feed-forward network. The alternation then fits the smaller one, in which nothing is pruned."""
    dense, name = feed_forward_of(context, network), f"{block.name}: "
    if alternate is None:
        x, y = fitted_input(context, block, network, cache), None
    else:
        x, y = feed_forward_data(context, block, network, cache, target)
    chunks = cache.chunks(cache.fitted)
    with phase("local_solve"):
        removal = remove_units(
            *(dense, x[: sum(chunks)], keep, solver.name),
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
            solution = alternate(small, x, y, stored, name=name, on_iteration=on_iteration)
        small, result.errors, result.held_out_errors = (
            solution.feed_forward,
            solution.errors,
            solution.held_out_errors,
        )
    weights = with_zeros(small, removal.kept)
    for role, p in network.roles.items():
        context.adapter.write_whole(p, weights[role])
    result.layer_errors[down.name] = _error(context, solver, dense.down, weights["down"], removal.hidden)


def _error(context: Context, solver: LayerSolver, dense: Tensor, weight: Tensor, inputs: InputStatistics) -> float:
    """Relative error of a projection that is whole on every rank."""
    mine = context.ranks.local_rows(len(dense))
    return solver.error(dense[mine], weight[mine], inputs)
