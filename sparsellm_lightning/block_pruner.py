"""Pruning one block: its projections in the order of evaluation, each on what those before it, pruned, really give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Block, DecoderLayout, Projection, device_of
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.journal import Entry
from sparsellm_lightning.layers import LayerPruner
from sparsellm_lightning.masks import local_tensor
from sparsellm_lightning.placement import return_free_memory
from sparsellm_lightning.products import coarse_dtype
from sparsellm_lightning.ranks import SINGLE
from sparsellm_lightning.reconstruct import Reconstructor, batches_of_interest
from sparsellm_lightning.replay import AttentionReplay
from sparsellm_lightning.results import BlockResult
from sparsellm_lightning.solvers.feed_forward import FeedForward, Tokens, change_of_output
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.solvers.sparsellm import Prune, Solution, solve_locally
from sparsellm_lightning.statistics import Gram, check_finite
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Stream, TokenBuffer, run_block


@dataclass
class Task:
    """A block to prune, and what runs through it.

    Args:
        block: dense until it is pruned.
        stream: hidden states in front of the block; behind it when the task is done.
        dense: the dense model's own hidden states likewise, where they are a target.
        entry: of a journal, which is taken instead of solving anything.

    Attributes:
        dense_y: the feed-forward output in the dense model, (tokens, d), where it does not end in the residual stream.
        result: filled on the way.
    """

    block: Block
    stream: Stream
    dense: Stream | None = None
    entry: Entry | None = None
    dense_y: Tensor | None = None
    result: BlockResult = field(init=False)

    def __post_init__(self) -> None:
        self.result = BlockResult(self.block.index) if self.entry is None else self.entry.result


class BlockPruner:
    """Prunes block after block, and moves the hidden states behind each.

    Args:
        layout: the model's blocks.
        config: settings.
        adapter: of the strategy the model runs under.
        stopwatch: gets the seconds and the work.
        layers: prunes projections that share an input.
        alternate: :func:`~sparsellm_lightning.solvers.sparsellm.solve_feed_forward`, with all arguments that are the same in
            every block.
        replay: of attention, empty.
        on_iteration: see :class:`~sparsellm_lightning.walker.Walker`.
    """

    def __init__(
        self,
        layout: DecoderLayout,
        config: PruningConfig,
        adapter: StrategyAdapter,
        stopwatch: Stopwatch,
        layers: LayerPruner,
        alternate: Callable[..., Solution],
        replay: AttentionReplay,
        on_iteration: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.layout, self.config, self.adapter, self.stopwatch, self.layers = layout, config, adapter, stopwatch, layers
        self.alternate, self.replay, self.on_iteration = alternate, replay, on_iteration
        self.global_blocks = config.globally_solved(len(layout.blocks))

    def prune(self, task: Task) -> BlockResult:
        """Prune a block in place; raises what :meth:`~sparsellm_lightning.walker.Walker.walk` does."""
        block, stream = task.block, task.stream
        if task.dense is not None:
            self._advance_dense(task)
        if not self.config.reconstruct or not any(p.pruned for p in block.projections()):
            self._solve(task)
            return task.result
        before = stream.hidden
        if task.entry is None:
            batches = batches_of_interest(stream, self.config.reconstruct, self.adapter, device_of(block.module))
            tuned = stream.part(batches)
            goal = (
                run_block(block, tuned, self.adapter, self.stopwatch)
                if task.dense is None
                else [task.dense.hidden[index] for index in batches]
            )
            self._solve(task, is_final=False)
            stream.hidden = before
            self._reconstruct(task, tuned, goal)
            del tuned, goal
        else:
            for name, parameter in block.module.named_parameters():
                local_tensor(parameter).copy_(task.entry.tensors[name])
        stream.hidden = self._run(task)
        return task.result

    def _advance_dense(self, task: Task) -> None:
        """Move the dense stream behind the still dense block."""
        assert task.dense is not None
        if self.layout.additive:
            task.dense.hidden = run_block(task.block, task.dense, self.adapter, self.stopwatch)
            return
        down = task.block.feed_forward["down"]
        y = TokenBuffer(task.dense.tokens, down.shape[0], task.dense.home)
        task.dense.hidden = run_block(
            task.block, task.dense, self.adapter, self.stopwatch, on_output=(down.module, y.add)
        )
        task.dense_y = y.filled()

    def _solve(self, task: Task, is_final: bool = True) -> None:
        """Prune without gradients and, where that is final, move the stream behind the block."""
        self.replay.inputs.clear()  # of a block whose feed-forward network was skipped
        for index, group in enumerate(task.block.attention):
            if task.entry is not None:
                for p in group:
                    self.adapter.write_rows(p, task.entry.tensors[p.name].to(p.parameter.device))
            elif any(projection.pruned for projection in group):
                self._prune_attention(task, index)
        if any(projection.pruned for projection in task.block.feed_forward.values()):
            self._prune_feed_forward(task, is_final)
        elif is_final:
            task.stream.hidden = self._run(task)

    def _prune_attention(self, task: Task, index: int) -> None:
        """Prune a group of attention projections, which share their input."""
        block = task.block
        group = block.attention[index]
        gram = Gram(group[0].shape[1], device_of(block.module))

        def see(x: Tensor) -> None:
            with self.stopwatch.phase("statistics"):
                gram.add(x)

        # The one projection behind the attention is the last that changes it.
        ends = 0 < index == len(block.attention) - 1 and len(group) == 1
        self._run(task, on_input=[(group[0].module, see)], until=index, replay=self.replay if ends else None)
        with self.stopwatch.phase("statistics"):
            statistics = gram.mean(self.adapter.ranks)
        check_finite(statistics, group[0].name)
        inputs = InputStatistics(statistics, self.config.damping, group[0].name)
        rows = {p.name: self.adapter.read_rows(p) for p in group}
        pruned = self.layers.prune({p.name: p for p in group}, rows, rows, inputs)
        for p in (p for p in group if p.pruned):
            self.adapter.write_rows(p, pruned[p.name])
            task.result.layer_errors[p.name] = self.layers.error(rows[p.name], pruned[p.name], inputs)

    def _prune_feed_forward(self, task: Task, is_final: bool) -> None:
        """Prune a feed-forward network, the block's attention being done."""
        block, stream, dense = task.block, task.stream, task.dense
        if not is_final and block.index not in self.global_blocks:
            self._prune_feed_forward_alone(task)
            return
        x, y, outputs = self._feed_forward_data(block, stream, self.replay)
        self.replay.inputs.clear()
        if self.layout.additive:
            stream.hidden = []  # the block need not run again
        return_free_memory()
        whole = {role: self.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = self._as_feed_forward(block, whole)
        _check_feed_forward(block, feed_forward, x, y)
        if dense is not None and block.index in self.global_blocks:
            if task.dense_y is not None:
                y = task.dense_y
            else:
                # What the feed-forward output must be for the block to end where the dense model did.
                start = 0
                for wanted, given in zip(dense.valid_tokens(), outputs.valid_tokens(), strict=True):
                    y[start : start + len(wanted)] += wanted - given
                    start += len(wanted)
                outputs = replace(dense, hidden=[hidden.clone() for hidden in dense.hidden])
        if task.entry is None:
            change = self._solve_feed_forward(task, feed_forward, whole, x, y)
        else:
            for role, p in block.feed_forward.items():
                noted = task.entry.tensors[p.name].to(p.parameter.device)
                whole[role] = self.adapter.ranks.gather_rows(noted, p.shape[0]).float()
                self.adapter.write_whole(p, whole[role])
            after = self._as_feed_forward(block, whole)
            tokens = Tokens(x, y, after.down_bias, stream.chunks(), after.up.device)
            change, _ = change_of_output(after, tokens, 0, SINGLE, y)
        if not is_final:
            return
        if self.layout.additive:
            # The residual stream is additive: the block ends where y would have brought it, and the change of y.
            outputs.add_(change)
            stream.hidden = outputs.hidden
        else:
            stream.hidden = self._run(task)

    def _prune_feed_forward_alone(self, task: Task) -> None:
        """By the local solver, where what it makes of the block's output need not be known."""
        block, stream = task.block, task.stream
        whole = {role: self.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = self._as_feed_forward(block, whole)
        sample = stream.part(range(min(1, len(stream.hidden))))
        _check_feed_forward(block, feed_forward, *self._feed_forward_data(block, sample)[:2])
        first = _first(block)
        x = TokenBuffer(sum(stream.windows[: stream.fitted]), first.shape[1], stream.home)
        self._run(task, on_input=[(first.module, x.add)], until=len(block.attention), replay=self.replay)
        self.replay.inputs.clear()
        with self.stopwatch.phase("statistics"):
            solved, inputs, hidden = solve_locally(
                feed_forward,
                x.filled(),
                self._prune_rows(block, whole),
                damping=self.config.damping,
                ranks=self.adapter.ranks,
                chunks=stream.chunks()[: stream.chunks_of(stream.fitted)],
                name=f"{block.name}: ",
            )
        self._write_feed_forward(task, whole, solved, inputs, hidden)

    def _solve_feed_forward(
        self, task: Task, feed_forward: FeedForward, whole: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> Tensor:
        """Solve for the weights of a feed-forward network and write them; returns by how much its output then misses y."""
        block = task.block
        is_global = block.index in self.global_blocks
        with self.stopwatch.phase("alternation" if is_global else "statistics"):
            solution = self.alternate(
                feed_forward,
                x,
                y,
                self._prune_rows(block, whole),
                iterations=self.config.num_iterations if is_global and self.config.requested_sparsity > 0 else 1,
                reuse_target=True,
                name=f"{block.name}: ",
                on_iteration=lambda iteration, error: self._after_iteration(block, iteration, error),
            )
        self._write_feed_forward(task, whole, solution.feed_forward, solution.inputs, solution.hidden)
        task.result.errors, task.result.held_out_errors = solution.errors, solution.held_out_errors
        return solution.change

    def _prune_rows(self, block: Block, whole: dict[str, Tensor]) -> Prune:
        """What the solvers of a feed-forward network prune its projections by, given its dense weights."""
        dense = self._my_rows(block, whole)
        return lambda rows, inputs: self.layers.prune(block.feed_forward, rows, dense, inputs)

    def _my_rows(self, block: Block, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        return {role: whole[role][self.adapter.ranks.local_rows(p.shape[0])] for role, p in block.feed_forward.items()}

    def _write_feed_forward(
        self,
        task: Task,
        whole: dict[str, Tensor],
        solved: FeedForward,
        inputs: InputStatistics,
        hidden: InputStatistics,
    ) -> None:
        """Write the solved weights and note their errors; ``whole`` are the dense ones."""
        dense = self._my_rows(task.block, whole)
        for role, p in task.block.feed_forward.items():
            if p.pruned:
                weight = getattr(solved, role)
                self.adapter.write_whole(p, weight)
                statistics = hidden if role == "down" else inputs
                mine = weight[self.adapter.ranks.local_rows(p.shape[0])]
                task.result.layer_errors[p.name] = self.layers.error(dense[role], mine, statistics)

    def _after_iteration(self, block: Block, iteration: int, error: float) -> None:
        return_free_memory()
        if self.on_iteration is not None:
            self.on_iteration(block.index, iteration, error)

    def _reconstruct(self, task: Task, stream: Stream, goal: list[Tensor]) -> None:
        """Tune the kept weights of a pruned block: of hidden states in front of it, a goal is what should come out."""
        assert self.config.reconstruct
        dtype = coarse_dtype(device_of(task.block.module), self.config.solver_precision == "float32")
        with self.stopwatch.phase("reconstruction"):
            reconstructor = Reconstructor(
                task.block,
                stream,
                goal,
                self.adapter,
                self.config.reconstruct,
                None if dtype == torch.float32 else dtype,
                self.config.seed,
            )
            (before, after), steps = reconstructor.tune()
        task.result.reconstruction = {
            "steps": steps,
            "fitted": [before[0], after[0]],
            "held_out": [None if math.isnan(errors[1]) else errors[1] for errors in (before, after)],
        }
        self._after_iteration(task.block, len(task.result.errors), after[0] if math.isnan(after[1]) else after[1])

    def _feed_forward_data(
        self, block: Block, stream: Stream, replay: AttentionReplay | None = None
    ) -> tuple[Tensor, Tensor, Stream]:
        """Input and output of the feed-forward network, (tokens, d) each, and the block's outputs."""
        first, down = _first(block), block.feed_forward["down"]
        x, y = (TokenBuffer(stream.tokens, size, stream.home) for size in (first.shape[1], down.shape[0]))
        outputs = run_block(
            block,
            stream,
            self.adapter,
            self.stopwatch,
            on_input=[(first.module, x.add)],
            on_output=(down.module, y.add),
            replay=replay,
        )
        return x.filled(), y.filled(), replace(stream, hidden=outputs)

    def _as_feed_forward(self, block: Block, weights: dict[str, Tensor]) -> FeedForward:
        biases: dict[str, Any] = {
            f"{role}_bias": self.adapter.whole_bias(projection) for role, projection in block.feed_forward.items()
        }
        return FeedForward(self.layout.activation, **weights, **biases)

    def _run(self, task: Task, **options: Any) -> list[Tensor]:
        return run_block(task.block, task.stream, self.adapter, self.stopwatch, **options)


def _first(block: Block) -> Projection:
    """A projection that sees the input of the feed-forward network."""
    return block.feed_forward.get("gate") or block.feed_forward["up"]


def _check_feed_forward(block: Block, feed_forward: FeedForward, x: Tensor, y: Tensor) -> None:
    """The table's row describes the block truly: our feed-forward gives the block's own output."""
    device = feed_forward.up.device
    x, y = x[:64], y[:64]
    ours, theirs = feed_forward(x.to(device, torch.float32)), y.to(device, torch.float32)
    tolerance = 1e-3 if x.dtype == y.dtype == torch.float32 else 0.1
    if len(ours) and not float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-6:
        if not (bool(torch.isfinite(ours).all()) and bool(torch.isfinite(theirs).all())):
            return  # the solver names the projection
        raise UserError(
            f"{block.name}: the architecture table's feed-forward row does not reproduce the block's output (relative "
            f"difference {float((ours - theirs).norm() / theirs.norm()):.2g}). Correct gate, up, down and activation."
        )
