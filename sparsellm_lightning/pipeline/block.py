"""Solving one block: its units in the order of evaluation, each calibrated after those before it are pruned."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block, Experts, Linears, Network
from sparsellm_lightning.calibration import (
    ActivationCache,
    Context,
    LayerSolver,
    RoutedTokens,
    feed_forward_of,
    observe_input,
    run_block,
)
from sparsellm_lightning.reporting import BlockResult
from sparsellm_lightning.runtime import phase
from sparsellm_lightning.solvers import (
    FeedForward,
    Gram,
    InputStatistics,
    Prune,
    Solution,
    TokenBuffer,
    solve_locally,
)

ALTERNATION_TOKENS = 5  # tokens that carry auxiliaries, per hidden feature

Alternate = Callable[..., Solution]
"""``solve_feed_forward`` with the arguments that are equal in every block."""

FeedForwardTarget = Callable[[Tensor, Network, list[Tensor]], Tensor]
"""``(dense feed-forward output (tokens, d), its network, block outputs by batch) -> target of the alternation (tokens, d)``."""


@dataclass(frozen=True)
class BlockProblem:
    """A block to prune, and what its solve is given.

    Args:
        solver: of projections that share an input.
        block: dense.
        cache: activations in front of the block. Not changed.
        alternate: the alternation, for feed-forward networks. None: ``solver``.
        target: of the alternation. None: the dense feed-forward output. Experts always have their dense output as target.
        on_iteration: called with (iteration, error) of the alternation.
    """

    solver: LayerSolver
    block: Block
    cache: ActivationCache
    alternate: Alternate | None = None
    target: FeedForwardTarget | None = None
    on_iteration: Callable[[int, float], None] = lambda iteration, error: None

    @property
    def context(self) -> Context:
        """The run's context."""
        return self.solver.context

    def statistics(self, unit: Linears | Network) -> InputStatistics:
        """Statistics of a unit's input, over all ranks' fitted tokens.

        Raises:
            NumericalError: the input holds NaN or infinity.
        """
        first = unit.projections[0]
        gram = Gram(first.shape[1], self.context.device)

        def see(x: Tensor) -> None:
            with phase("statistics"):
                gram.add(x)

        observe_input(self.context, self.block, self.cache, unit, see)
        with phase("statistics"):
            return gram.statistics(self.context.config.damping, self.context.ranks, first.name)

    def fitted_input(self, network: Network) -> Tensor:
        """Input of a feed-forward network, (fitted tokens, d)."""
        x = TokenBuffer(self.cache.fitted_tokens, network.roles["up"].shape[1], self.cache.storage)
        observe_input(self.context, self.block, self.cache, network, x.add)
        return x.filled()

    def input_and_target(self, network: Network) -> tuple[Tensor, Tensor]:
        """Input of a feed-forward network, and the output that it should give, (tokens, d) each."""
        sizes = network.roles["up"].shape[1], network.roles["down"].shape[0]
        x, y = (TokenBuffer(self.cache.tokens, size, self.cache.storage) for size in sizes)
        seen = {"inputs": [(network.observed, x.add)], "outputs": [(network.output, y.add)]}
        outputs = run_block(self.context, self.block, self.cache, **seen)
        return x.filled(), y.filled() if self.target is None else self.target(y.filled(), network, outputs)


def solve_block(problem: BlockProblem) -> BlockResult:
    """Prune a block in place.

    Raises:
        NumericalError: NaN or infinity in activations, or a Gram matrix that cannot be factored.
    """
    result = BlockResult(problem.block.index)
    for unit in problem.block.units:
        if not any(p.pruned for p in unit.projections):
            continue
        if isinstance(unit, Linears):
            _solve_linears(problem, unit, result)
        elif isinstance(unit, Network):
            _solve_network(problem, unit, result)
        else:
            _solve_experts(problem, unit, result)
    return result


def _solve_linears(problem: BlockProblem, unit: Linears, result: BlockResult) -> None:
    """Prune projections that share an input, and note their errors."""
    solver, adapter, inputs = problem.solver, problem.context.adapter, problem.statistics(unit)
    projections = {p.name: p for p in unit.projections}
    rows = {name: adapter.read_rows(p) for name, p in projections.items()}
    pruned = solver.prune(projections, rows, rows, inputs)
    for name, p in projections.items():
        if p.pruned:
            adapter.write_rows(p, pruned[name])
            result.layer_errors[name] = solver.error(rows[name], pruned[name], inputs)


def _solve_network(problem: BlockProblem, network: Network, result: BlockResult) -> None:
    """Prune a feed-forward network that sees every token."""
    feed_forward = feed_forward_of(problem.context, network)
    prune = _pruner(problem, network, feed_forward)
    name = f"{problem.block.name}: "
    if problem.alternate is None:
        chunks = problem.cache.chunks(problem.cache.fitted)
        x = problem.fitted_input(network)
        solution = _solve_locally(problem.context, feed_forward, x, prune, chunks=chunks, name=name)
    else:
        x, y = problem.input_and_target(network)
        with phase("alternation"):
            solution = problem.alternate(feed_forward, x, y, prune, name=name, on_iteration=problem.on_iteration)
        result.errors, result.held_out_errors = solution.errors, solution.held_out_errors
    _write_network(problem, network, feed_forward, solution, result)


def _solve_experts(problem: BlockProblem, experts: Experts, result: BlockResult) -> None:
    """Prune every expert on the tokens that are routed to it. One expert's statistics are in memory at a time."""
    context, cache = problem.context, problem.cache
    routed = RoutedTokens(context, problem.block, cache, experts)
    errors: list[list[float]] = []
    held_out_errors: list[list[float]] = []
    for index, network in enumerate(experts.networks):
        if not any(p.pruned for p in network.projections):
            continue
        output_size, width = network.roles["down"].shape
        tokens = routed.of(index, borrowing_below=width)
        result.borrowing_experts += tokens.borrows
        feed_forward = feed_forward_of(context, network)
        prune = _pruner(problem, network, feed_forward)
        name = f"{problem.block.name}: expert {index}: "
        if problem.alternate is None:
            fitted = tokens.fitted()
            solution = _solve_locally(
                context, feed_forward, fitted.x, prune, chunks=fitted.chunks, weights=fitted.weights, name=name
            )
        else:
            y = TokenBuffer(len(tokens.x), output_size, cache.storage)
            for part in tokens.x.split(tokens.chunks):
                y.add(feed_forward(part.to(context.device, torch.float32, non_blocking=True)))
            windows = alternation_windows(context, tokens.fitted_windows, width)
            with phase("alternation"):
                solution = problem.alternate(
                    feed_forward,
                    tokens.x,
                    y.filled(),
                    prune,
                    chunks=tokens.chunks,
                    leading_chunks=None if windows is None else tokens.chunks_of(windows),
                    fitted_chunks=tokens.fitted_chunks,
                    weights=tokens.weights,
                    name=name,
                )
            errors.append(solution.errors)
            held_out_errors.append(solution.held_out_errors)
        _write_network(problem, network, feed_forward, solution, result)
    if errors and not result.errors:
        result.errors, result.held_out_errors = _mean(errors), _mean(held_out_errors)
        for iteration, error in enumerate(result.errors):
            problem.on_iteration(iteration, error)


def alternation_windows(context: Context, tokens: Sequence[int], width: int) -> int | None:
    """Number of this rank's windows that carry auxiliaries. None: all.

    They are the first of all windows that have enough tokens together, for any number of ranks: window i belongs to rank
    ``i mod size``.

    Args:
        context: of the run. All ranks call this together.
        tokens: of each of this rank's fitted windows.
        width: hidden features of the network.
    """
    ranks, wanted = context.ranks, ALTERNATION_TOKENS * width
    rounds = ranks.largest(len(tokens))
    if not rounds:
        return None
    of_rank = ranks.gather_counts(*tokens, *[0] * (rounds - len(tokens)))
    # An expert may have no token of some windows.
    sums = list(accumulate(of_rank[i % ranks.size][i // ranks.size] for i in range(rounds * ranks.size)))
    if wanted >= sums[-1]:
        return None
    first = bisect_left(sums, wanted) + 1
    return len(range(ranks.rank, first, ranks.size))


def _mean(by_expert: list[list[float]]) -> list[float]:
    """Mean over experts of each iteration's error. An expert that stopped early keeps its last one."""
    iterations = max(map(len, by_expert))
    filled = [errors + errors[-1:] * (iterations - len(errors)) for errors in by_expert if errors]
    return [sum(column) / len(column) for column in zip(*filled, strict=True)]


def _solve_locally(context: Context, feed_forward: FeedForward, x: Tensor, prune: Prune, **options: Any) -> Solution:
    with phase("statistics"):
        return solve_locally(feed_forward, x, prune, damping=context.config.damping, ranks=context.ranks, **options)


def _pruner(problem: BlockProblem, network: Network, dense: FeedForward) -> Prune:
    """The function by which the solvers of a feed-forward network prune its projections."""
    mine = _my_rows(problem.context, network, dense)
    return lambda rows, inputs: problem.solver.prune(network.roles, rows, mine, inputs)


def _my_rows(context: Context, network: Network, whole: FeedForward) -> dict[str, Tensor]:
    return {role: getattr(whole, role)[context.ranks.local_rows(p.shape[0])] for role, p in network.roles.items()}


def _write_network(
    problem: BlockProblem, network: Network, dense: FeedForward, solution: Solution, result: BlockResult
) -> None:
    """Write the solved weights into the model, and note the errors of the projections."""
    context = problem.context
    mine = _my_rows(context, network, dense)
    for role, p in network.roles.items():
        if p.pruned:
            weight: Tensor = getattr(solution.feed_forward, role)
            context.adapter.write_whole(p, weight)
            inputs = solution.hidden if role == "down" else solution.inputs
            solved = weight[context.ranks.local_rows(p.shape[0])]
            result.layer_errors[p.name] = problem.solver.error(mine[role], solved, inputs)
