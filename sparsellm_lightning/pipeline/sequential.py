"""Block after block through the model: calibrate and solve, tune, advance.

Each block sees the activations that the pruned blocks before it give. At most one block's statistics and auxiliaries are in
memory, besides the activations in front of it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.allocation import allocate, choose_shrinkage, leave_out
from sparsellm_lightning.architecture import Block, Network
from sparsellm_lightning.calibration import (
    ActivationCache,
    Context,
    LayerSolver,
    capture,
    check_finite_activations,
    check_finite_weights,
    feature_importance,
    run_block,
)
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.models import Shrinkage
from sparsellm_lightning.pipeline.block import (
    Alternate,
    BlockProblem,
    FeedForwardTarget,
    alternation_windows,
    solve_block,
)
from sparsellm_lightning.pipeline.estimate import sizes_of_block
from sparsellm_lightning.pipeline.resume import Journal
from sparsellm_lightning.pipeline.shrink import shrink_block
from sparsellm_lightning.pipeline.tune import Reconstructor, batches_of_interest
from sparsellm_lightning.reporting import BlockResult
from sparsellm_lightning.runtime import Placement, Sizes, explaining_memory, phase, place, return_free_memory
from sparsellm_lightning.solvers import (
    FeedForward,
    Fused,
    Solution,
    TokenBuffer,
    preactivation_step,
    solve_feed_forward,
)

WORTH_COMPILING = 2**29  # updates x calibration tokens x hidden features from which compiling z and s steps (10 s) pays

OnIteration = Callable[[int, int, float], None]
"""(block index, iteration, error): of the feed-forward output after each iteration of the alternation; then, as one more
iteration, of the block's output after its reconstruction."""


@torch.no_grad()
def prune_blocks(
    context: Context,
    batches: Sequence[CalibrationBatch],
    fitted: int,
    journal: Journal | None = None,
    on_iteration: OnIteration = lambda block, iteration, error: None,
) -> Iterator[BlockResult]:
    """Prune every block in place, yielding after each.

    Args:
        context: of the run.
        batches: this rank's calibration windows, on the model's device.
        fitted: number of windows that are fitted: the first ones. The others are held out.
        journal: blocks in it are restored instead of solved. The others are written to it.
        on_iteration: see :data:`OnIteration`.

    Raises:
        NumericalError: NaN or infinity in activations, or a Gram matrix that cannot be factored.
        OutOfMemoryError: no room for a block's solve.
    """
    with explaining_memory(
        lambda: (
            "Hidden states and, of padded windows, attention masks of all calibration windows are kept in front of the first "
            "block. Lower num_calibration_samples, or give shorter windows or windows without padding."
        )
    ):
        cache = capture(context, batches, fitted)
    check_finite_activations(context, cache.valid_tokens(), "in front of the first block")
    windows = alternation_windows(context, cache.windows[: cache.fitted], context.layout.widest[1])
    sizes = _sizes(context, cache, windows)
    placement = place(context.config.memory, sizes, context.device)
    cache.move_to(placement.activations)
    solver = LayerSolver(context)
    shrinkage = None
    uneven = context.config.removes or context.config.allocation != "uniform"
    if uneven and context.config.requested_sparsity > 0:
        with phase("allocation"), explaining_memory(lambda: _explain_memory(context, cache, sizes, "allocation")):
            if context.config.removes:
                shrinkage = _shrinkage(context, cache, batches, journal)
            else:
                solver = LayerSolver(context, _sparsities(context, cache, batches, journal))
    importance: Mapping[int, Tensor] = {}
    if context.config.reconstruction_steps and context.config.requested_sparsity > 0:
        with explaining_memory(lambda: _explain_memory(context, cache, sizes, "importance of features")):
            importance = feature_importance(context, cache)
    removed = frozenset() if shrinkage is None else shrinkage.blocks
    # If whole blocks alone are removed, tuning begins with the block in front of the first removed one.
    first_tuned = min(removed, default=0) - 1 if shrinkage == Shrinkage(blocks=removed) else 0
    alternate = _alternation(context, cache, windows, placement)
    tuned = batches_of_interest(context, cache)
    # The dense model's activations advance beside the pruned model's only if they are a target: those of all windows for the
    # alternation, otherwise of those that tuning uses.
    followed = range(len(cache.hidden)) if context.alternating_blocks else tuned
    dense = cache.part(followed).apart() if context.config.target == "model" else None
    _pass_removed(context, 0, removed, dense)
    for block in context.layout.blocks:
        start = time.perf_counter()
        with explaining_memory(partial(_explain_memory, context, cache, sizes, block.name)):
            alternates = block.index in context.alternating_blocks
            target, reached = None, block.index
            if dense is not None and block.index not in removed:
                target = _advance_dense(context, block, dense, alternates)
                reached = _pass_removed(context, block.index + 1, removed, dense)
            result = None if journal is None else journal.restore(block)
            if result is None:
                after = partial(_after_iteration, on_iteration, block.index)
                untouched = block.index in removed or block.index < first_tuned
                goal = None if dense is None else [h for i, h in zip(followed, dense.hidden, strict=True) if i in tuned]
                tuning = None if untouched else _plan_tuning(context, block, cache.part(tuned), goal)
                alternation = alternate if alternates else None
                problem = BlockProblem(solver, block, cache, alternation, target, after)
                if block.index in removed:
                    leave_out(context, block)
                    result = BlockResult(block.index)
                elif shrinkage is not None:
                    result = shrink_block(problem, shrinkage)
                else:
                    result = solve_block(problem)
                if tuning is not None:
                    cache.replay_inputs.clear()  # tuning changes what is before them
                    error = _tune(context, block, *tuning, importance.get(reached), result)
                    after(len(result.errors), error)
                check_finite_weights(context, {f"{block.name}.{n}": p for n, p in block.module.named_parameters()})
                result.seconds = time.perf_counter() - start
                if journal is not None:
                    journal.write(block, result)
            if block is not context.layout.blocks[-1] and block.index not in removed:
                cache.hidden = run_block(context, block, cache)
                check_finite_activations(context, cache.valid_tokens(), f"after the pruned {block.name}")
        cache.replay_inputs.clear()
        cache.forget_arguments(block.index)
        if dense is not None:
            dense.forget_arguments(block.index)
        return_free_memory()
        yield result


def _sparsities(
    context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch], journal: Journal | None
) -> dict[str, float]:
    """Sparsity of every pruned projection, by name. Kept in the journal: measuring is slow and differs between machines."""
    pruned = [p.name for p in context.layout.projections() if p.pruned]

    def choose() -> Tensor:
        found = allocate(context, cache, batches)
        return torch.tensor([found[name] for name in pruned], dtype=torch.float64)

    chosen = (choose() if journal is None else journal.remember("allocation", choose)).tolist()
    return dict(zip(pruned, chosen, strict=True))


def _shrinkage(
    context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch], journal: Journal | None
) -> Shrinkage:
    """What to remove. Kept in the journal, because a resumed run would measure other seconds."""

    def choose() -> Tensor:
        found = choose_shrinkage(context, cache, batches)
        return torch.tensor([found.units or 0, found.heads or 0, *sorted(found.blocks)])

    units, heads, *blocks = (choose() if journal is None else journal.remember("shrinkage", choose)).tolist()
    return Shrinkage(units or None, heads or None, frozenset(blocks))


def _after_iteration(on_iteration: OnIteration, block: int, iteration: int, error: float) -> None:
    return_free_memory()
    on_iteration(block, iteration, error)


def _pass_removed(context: Context, first: int, removed: Set[int], dense: ActivationCache | None) -> int:
    """Advance the dense model's activations through the removed blocks from ``first`` on, up to the first kept block.

    The block in front of ``first`` is then tuned towards the output of the last of these removed blocks.

    Returns:
        index of the block behind which the activations now are.
    """
    for block in context.layout.blocks[first:]:
        if dense is None or block.index not in removed:
            break
        dense.hidden = run_block(context, block, dense)
        first += 1
    return first - 1


def _advance_dense(
    context: Context, block: Block, dense: ActivationCache, alternates: bool
) -> FeedForwardTarget | None:
    """Move the dense model's activations behind a block that is still dense.

    Returns:
        the alternation's target: the feed-forward output that makes the block's output equal to the dense model's. If a norm
        follows the feed-forward network, that output is not known, and the target is the dense model's feed-forward output.
        None if the alternation skips the block, or if the block has no feed-forward network.
    """
    if not alternates or not block.networks:
        dense.hidden = run_block(context, block, dense)
        return None
    own = {
        network.roles["down"].name: TokenBuffer(dense.tokens, network.roles["down"].shape[0], dense.storage)
        for network in block.networks
        if network.scale is None
    }
    observed = [(n.output, own[n.roles["down"].name].add) for n in block.networks if n.scale is None]
    dense.hidden = run_block(context, block, dense, outputs=observed)

    def target(output: Tensor, network: Network, block_outputs: list[Tensor]) -> Tensor:
        if network.scale is None:
            return own[network.roles["down"].name].filled()
        return _corrected_output(dense, output, block_outputs, network.scale)

    return target


def _corrected_output(dense: ActivationCache, output: Tensor, block_outputs: list[Tensor], scale: float) -> Tensor:
    """``output + (block output of the dense model − block_outputs) / scale``, written into ``output``, (tokens, d)."""
    start = 0
    for wanted, given, mask in zip(dense.hidden, block_outputs, dense.valid, strict=True):
        difference = (wanted - given).flatten(0, 1) if mask is None else (wanted - given)[mask.to(wanted.device)]
        output[start : start + len(difference)] += difference if scale == 1 else difference / scale
        start += len(difference)
    return output


def _plan_tuning(
    context: Context, block: Block, cache: ActivationCache, goal: list[Tensor] | None
) -> tuple[ActivationCache, list[Tensor]] | None:
    """The activations that tuning a block uses, and the outputs that it should give. None if the block is not tuned.

    Args:
        context: of the run.
        block: still dense.
        cache: activations in front of the block, of the windows that tuning uses.
        goal: the dense model's activations behind the block, if they are the target. None: what the block gives.
    """
    steps = context.config.reconstruction_steps if context.config.requested_sparsity else 0
    if not steps or not any(p.pruned for p in block.projections()):
        return None
    goal = run_block(context, block, cache) if goal is None else goal
    reached = replace(cache, hidden=goal)
    check_finite_activations(context, reached.valid_tokens(), f"after the dense {block.name}")
    return cache, goal


def _tune(
    context: Context,
    block: Block,
    cache: ActivationCache,
    goal: list[Tensor],
    importance: Tensor | None,
    result: BlockResult,
) -> float:
    """Tune a pruned block and note its errors. Returns the error that chose: on held-out tokens, if there are any."""
    with phase("reconstruction"):
        (before, after), steps = Reconstructor(context, block, cache, goal, importance).tune()
    result.reconstruction = {
        "steps": steps,
        "fitted": [before[0], after[0]],
        "held_out": [None if math.isnan(errors[1]) else errors[1] for errors in (before, after)],
    }
    return after[0] if math.isnan(after[1]) else after[1]


def _alternation(context: Context, cache: ActivationCache, windows: int | None, placement: Placement) -> Alternate:
    """``solve_feed_forward`` with the arguments that are equal in every block.

    Args:
        windows: number of this rank's windows that carry auxiliaries. None: all that are fitted.
    """
    config, compiles = context.config, _compiling_pays(context, cache)
    compiled = functools.cache(lambda *form: Fused(preactivation_step(*form)))

    def solve(feed_forward: FeedForward, *args: Any, **options: Any) -> Solution:
        form = feed_forward.activation, feed_forward.gate is not None, feed_forward.up_bounds
        return solve_feed_forward(feed_forward, *args, step=compiled(*form) if compiles else None, **options)

    return partial(
        solve,
        iterations=config.num_iterations,
        penalties=config.penalties,
        damping=config.damping,
        ranks=context.ranks,
        chunks=cache.chunks(),
        leading_chunks=None if windows is None else len(cache.chunks(windows)),
        fitted_chunks=len(cache.chunks(cache.fitted)),
        auxiliary_dtype=_auxiliary_dtype(context),
        storage=placement.auxiliaries,
    )


def _auxiliary_dtype(context: Context) -> torch.dtype:
    # The raw objective takes p into the weight step, where its rounding is not averaged out.
    return context.coarse_dtype if context.config.penalties.scale_free else torch.float32


def _compiling_pays(context: Context, cache: ActivationCache) -> bool:
    """See :data:`WORTH_COMPILING`. The tokens of all ranks decide, so that all agree."""
    (tokens,) = context.ranks.total(cache.tokens)
    updates = len(context.alternating_blocks) * (context.config.num_iterations - 1)
    return bool(updates * tokens * context.layout.widest[1] >= WORTH_COMPILING)


def _sizes(context: Context, cache: ActivationCache, windows: int | None) -> Sizes:
    """Bytes that solving a block holds. ``windows``: see :func:`_alternation`."""
    config = context.config
    carrying = cache.windows[: cache.fitted if windows is None else windows]
    return sizes_of_block(
        context.layout,
        config,
        cache.tokens,
        sum(carrying) if context.alternating_blocks and config.num_iterations > 1 else 0,
        itemsize=max((h.element_size() for h in cache.hidden), default=4),
        auxiliary_itemsize=_auxiliary_dtype(context).itemsize,
    )


def _explain_memory(context: Context, cache: ActivationCache, sizes: Sizes, where: str) -> str:
    lower = "set memory to fewer bytes, to keep activations on the host, " * (context.device.type != "cpu")
    return (
        f"In {where}: besides the model, pruning a block takes {sizes.describe()} for this rank's {cache.tokens} calibration "
        f"tokens. memory is {context.config.memory!r}. To need less, {lower}lower num_calibration_samples, or use more ranks."
    )
