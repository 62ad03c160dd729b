"""Solving one block: its projections in the order of evaluation, each calibrated after those before it are pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import ActivationCache, Context, LayerSolver, observe_input, run_block
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.reporting import BlockResult
from sparsellm_lightning.runtime import phase
from sparsellm_lightning.solvers import (
    FeedForward,
    Gram,
    InputStatistics,
    Prune,
    Solution,
    TokenBuffer,
    check_finite,
    solve_locally,
)

Alternate = Callable[..., Solution]
"""``solve_feed_forward`` with the arguments that are equal in every block."""

FeedForwardTarget = Callable[[Tensor, list[Tensor]], Tensor]
"""``(dense feed-forward output (tokens, d), block outputs by batch) -> target of the alternation (tokens, d)``."""


def solve_block(
    context: Context,
    solver: LayerSolver,
    block: Block,
    cache: ActivationCache,
    alternate: Alternate | None = None,
    target: FeedForwardTarget | None = None,
    on_iteration: Callable[[int, float], None] | None = None,
) -> BlockResult:
    """Prune a block in place.

    Args:
        context: of the run.
        solver: of projections that share an input.
        block: dense.
        cache: activations in front of the block. Not changed.
        alternate: the alternation, for the feed-forward network. None: ``solver``.
        target: of the alternation. None: the dense feed-forward output.
        on_iteration: called with (iteration, error) of the alternation.

    Raises:
        UserError: the architecture's row does not describe the block.
        NumericalError: NaN or infinity in activations, or a Gram matrix that cannot be factored.
    """
    result = BlockResult(block.index)
    for index, group in enumerate(block.attention):
        if any(p.pruned for p in group):
            _solve_group(context, solver, block, index, calibrate(context, block, cache, index), result)
    if any(p.pruned for p in block.feed_forward.values()):
        dense = {role: context.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = _as_feed_forward(context, block, dense)
        prune = _pruner(context, solver, block, dense)
        if alternate is None:
            solution = _solve_locally(context, block, cache, feed_forward, prune)
        else:
            x, y, outputs = _feed_forward_data(context, block, cache)
            _check_feed_forward(block, feed_forward, x, y)
            if target is not None:
                y = target(y, outputs)
            del outputs
            with phase("alternation"):
                solution = alternate(feed_forward, x, y, prune, name=f"{block.name}: ", on_iteration=on_iteration)
            result.errors, result.held_out_errors = solution.errors, solution.held_out_errors
        _write_feed_forward(context, solver, block, dense, solution, result)
    return result


def calibrate(context: Context, block: Block, cache: ActivationCache, group: int) -> InputStatistics:
    """Statistics of the input that a group of projections shares, over all ranks' fitted tokens.

    Args:
        context: of the run.
        block: with its current weights.
        cache: activations in front of the block.
        group: index in :attr:`~sparsellm_lightning.architecture.Block.groups`.

    Raises:
        NumericalError: the input holds NaN or infinity.
    """
    first = block.groups[group][0]
    gram = Gram(first.shape[1], context.device)

    def see(x: Tensor) -> None:
        with phase("statistics"):
            gram.add(x)

    observe_input(context, block, cache, group, see)
    with phase("statistics"):
        mean = gram.mean(context.ranks)
    check_finite(mean, first.name)
    return InputStatistics(mean, context.config.damping, first.name)


def _solve_group(
    context: Context, solver: LayerSolver, block: Block, index: int, inputs: InputStatistics, result: BlockResult
) -> None:
    """Prune a group of projections in place, and note their errors."""
    projections = {p.name: p for p in block.groups[index]}
    rows = {name: context.adapter.read_rows(p) for name, p in projections.items()}
    pruned = solver.prune(projections, rows, rows, inputs)
    for name, p in projections.items():
        if p.pruned:
            context.adapter.write_rows(p, pruned[name])
            result.layer_errors[name] = solver.error(rows[name], pruned[name], inputs)


def _solve_locally(
    context: Context, block: Block, cache: ActivationCache, feed_forward: FeedForward, prune: Prune
) -> Solution:
    """The feed-forward network by the local solver."""
    if block.index == 0:
        sample = cache.part(range(min(1, len(cache.hidden))))
        _check_feed_forward(block, feed_forward, *_feed_forward_data(context, block, sample)[:2])
    x = TokenBuffer(cache.fitted_tokens, block.feed_forward_input.shape[1], cache.storage)
    observe_input(context, block, cache, len(block.attention), x.add)
    with phase("statistics"):
        return solve_locally(
            feed_forward,
            x.filled(),
            prune,
            damping=context.config.damping,
            ranks=context.ranks,
            chunks=cache.chunks()[: cache.chunks_of(cache.fitted)],
            name=f"{block.name}: ",
        )


def _pruner(context: Context, solver: LayerSolver, block: Block, dense: dict[str, Tensor]) -> Prune:
    """The function by which the solvers of a feed-forward network prune its projections.

    Args:
        dense: whole dense weights by role.
    """
    mine = _my_rows(context, block, dense)
    return lambda rows, inputs: solver.prune(block.feed_forward, rows, mine, inputs)


def _my_rows(context: Context, block: Block, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: whole[role][context.ranks.local_rows(p.shape[0])] for role, p in block.feed_forward.items()}


def _write_feed_forward(
    context: Context,
    solver: LayerSolver,
    block: Block,
    dense: dict[str, Tensor],
    solution: Solution,
    result: BlockResult,
) -> None:
    """Write the solved weights into the model, and note the errors of the projections."""
    mine = _my_rows(context, block, dense)
    for role, p in block.feed_forward.items():
        if p.pruned:
            weight: Tensor = getattr(solution.feed_forward, role)
            context.adapter.write_whole(p, weight)
            inputs = solution.hidden if role == "down" else solution.inputs
            solved = weight[context.ranks.local_rows(p.shape[0])]
            result.layer_errors[p.name] = solver.error(mine[role], solved, inputs)


def _feed_forward_data(context: Context, block: Block, cache: ActivationCache) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Input and output of the feed-forward network, (tokens, d) each, and the block's outputs by batch."""
    first, down = block.feed_forward_input, block.feed_forward["down"]
    x, y = (TokenBuffer(cache.tokens, size, cache.storage) for size in (first.shape[1], down.shape[0]))
    outputs = run_block(context, block, cache, inputs=[(first.module, x.add)], output=(down.module, y.add))
    return x.filled(), y.filled(), outputs


def _as_feed_forward(context: Context, block: Block, weights: dict[str, Tensor]) -> FeedForward:
    biases: dict[str, Any] = {f"{role}_bias": context.adapter.whole_bias(p) for role, p in block.feed_forward.items()}
    return FeedForward(context.layout.activation, **weights, **biases)


def _check_feed_forward(block: Block, feed_forward: FeedForward, x: Tensor, y: Tensor) -> None:
    """Refuse an architecture's row whose feed-forward network does not give the block's own output."""
    device = feed_forward.up.device
    x, y = x[:64], y[:64]
    ours, theirs = feed_forward(x.to(device, torch.float32)), y.to(device, torch.float32)
    tolerance = 1e-3 if x.dtype == y.dtype == torch.float32 else 0.1
    if len(ours) and not float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-6:
        if not (bool(torch.isfinite(ours).all()) and bool(torch.isfinite(theirs).all())):
            return  # the statistics' own check names the projection
        raise UserError(
            f"{block.name}: the architecture table's feed-forward row does not reproduce the block's output (relative "
            f"difference {float((ours - theirs).norm() / theirs.norm()):.2g}). Correct gate, up, down and activation."
        )
