"""Block by block through the model: inputs from the already pruned blocks, within a block in the order of evaluation.

At most one block's statistics and auxiliaries are in memory, plus the block inputs of this rank's calibration tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Block, DecoderLayout, Projection, device_of
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.journal import Entry, Journal
from sparsellm_lightning.patterns import Containing, Pattern, Stacked
from sparsellm_lightning.solvers.local import LOCAL_SOLVERS, InputStatistics
from sparsellm_lightning.solvers.sparsellm import FeedForward, Penalties, Solution, coarse_dtype, solve_feed_forward
from sparsellm_lightning.statistics import Gram, check_finite, relative_error
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Observer, Stream, TokenBuffer, enter_model, run_block


@dataclass(frozen=True)
class BlockResult:
    """What pruning one block did.

    Args:
        index: of the block.
        errors: relative error of the feed-forward output after each iteration, on the calibration tokens.
        seconds: wall time.
        layer_errors: by projection name, ``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`` of the weights as stored, X being the input it was
            calibrated on.
    """

    index: int
    errors: list[float]
    seconds: float
    layer_errors: dict[str, float]


class Walker:
    """Prunes a model block by block.

    Args:
        layout: the model's blocks.
        config: settings.
        adapter: of the strategy the model runs under.
        on_iteration: called with (block index, iteration, error) as the alternation goes.
    """

    def __init__(
        self,
        layout: DecoderLayout,
        config: PruningConfig,
        adapter: StrategyAdapter,
        on_iteration: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.layout, self.config, self.adapter = layout, config, adapter
        self.on_iteration = on_iteration
        local = config.local_solver if config.method == "sparsellm" else config.method
        self.local_solve = LOCAL_SOLVERS[local]
        self.global_blocks = config.globally_solved(len(layout.blocks))
        self.stopwatch = Stopwatch(device_of(layout.model))
        device = device_of(layout.model)
        # The paper's raw objective takes p into the weight step: it is then no longer averaged out.
        exact = config.solver_precision == "float32" or not config.scale_free
        self.auxiliary_dtype = torch.float32 if exact else coarse_dtype(device)
        self.penalties = Penalties(config.alpha, config.beta, config.gamma, config.scale_free)

    @torch.no_grad()
    def enter(self, batches: Sequence[CalibrationBatch]) -> int:
        """Run the calibration inputs up to the first block; returns their valid tokens over all ranks.

        Args:
            batches: this rank's calibration windows, on the model's device.
        """
        self.stream = enter_model(self.layout, batches, self.adapter, self.stopwatch)
        tokens = torch.tensor([self.stream.tokens], device=device_of(self.layout.model))
        self.adapter.ranks.sum_(tokens)
        return int(tokens)

    @torch.no_grad()
    def walk(self, journal: Journal | None = None) -> Iterator[BlockResult]:
        """Prune every block in place, yielding after each. Call :meth:`enter` first.

        Args:
            journal: blocks that it holds are taken from it, the others are written to it.

        Raises:
            NumericalError: NaN or infinity in activations, or a Gram matrix that cannot be factored.
        """
        stream = self.stream
        # The dense model's own hidden states travel along only if they are a target.
        dense = (
            replace(stream, hidden=list(stream.hidden))
            if self.config.target == "model" and self.global_blocks
            else None
        )
        for block in self.layout.blocks:
            start = time.perf_counter()
            entry = None if journal is None else journal.read(block)
            errors, layer_errors = self._prune_block(block, stream, dense, entry)
            if journal is not None and entry is None:
                journal.write(block, errors, layer_errors)
            stream.arguments[block.index].clear()
            yield BlockResult(block.index, errors, time.perf_counter() - start, layer_errors)

    def _prune_block(
        self, block: Block, stream: Stream, dense: Stream | None, entry: Entry | None
    ) -> tuple[list[float], dict[str, float]]:
        """Prune a block and move the stream behind it; with an entry of the journal, without solving anything."""
        layer_errors: dict[str, float] = {} if entry is None else entry.layer_errors
        dense_target: Tensor | None = None
        if dense is not None:
            dense_target = self._dense_target(block, dense)
        for group in block.attention:
            if entry is not None:
                for p in group:
                    self.adapter.write_rows(p, entry.rows[p.name].to(p.parameter.device))
            elif any(projection.pruned for projection in group):
                gram = Gram(group[0].shape[1], device_of(block.module))
                self._run(block, stream, on_input=(group[0].module, self._timed("statistics", gram.add)), go_on=False)
                with self.stopwatch.phase("statistics"):
                    statistics = gram.mean(self.adapter.ranks)
                check_finite(statistics, group[0].name)
                inputs = InputStatistics(statistics, self.config.damping, group[0].name)
                rows = {p.name: self.adapter.read_rows(p) for p in group}
                pruned = self._prune({p.name: p for p in group}, rows, rows, inputs)
                for p in (p for p in group if p.pruned):
                    self.adapter.write_rows(p, pruned[p.name])
                    layer_errors[p.name] = self._error_as_stored(p, rows[p.name], pruned[p.name], inputs)
        if not any(projection.pruned for projection in block.feed_forward.values()):
            stream.hidden = self._run(block, stream)
            return [], layer_errors

        x, y, outputs = self._feed_forward_data(block, stream)
        whole = {role: self.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = self._as_feed_forward(block, whole)
        self._check_feed_forward(block, feed_forward, x, y)
        target = y
        if dense_target is not None and block.index in self.global_blocks:
            # What the feed-forward output must be for the block to end where the dense model did.
            target = dense_target - outputs.valid_tokens() + y if self.layout.additive else dense_target
        if entry is None:
            with self.stopwatch.phase("alternation" if block.index in self.global_blocks else "statistics"):
                solution = self._solve(block, feed_forward, x, target, stream.chunks())

        stored = dict(whole)
        for role, p in block.feed_forward.items():
            if entry is not None:
                noted = entry.rows[p.name].to(p.parameter.device)
                stored[role] = self.adapter.ranks.gather_rows(noted, p.shape[0]).float()
                self.adapter.write_whole(p, stored[role])
            elif p.pruned:
                weight = getattr(solution.feed_forward, role)
                self.adapter.write_whole(p, weight)
                stored[role] = _as_stored(weight, p)
                mine = self.adapter.ranks.local_rows(p.shape[0])
                inputs = solution.hidden if role == "down" else solution.inputs
                layer_errors[p.name] = self._error_as_stored(p, whole[role][mine], weight[mine], inputs)
        if self.layout.additive:
            # The residual stream is additive: the block's new output differs by what the feed-forward's does.
            after = self._as_feed_forward(block, stored)
            outputs.add_(lambda part: after(x[part].float()) - y[part].float())
            stream.hidden = outputs.hidden
        else:
            stream.hidden = self._run(block, stream)
        return entry.errors if entry is not None else solution.errors, layer_errors

    def _solve(self, block: Block, feed_forward: FeedForward, x: Tensor, target: Tensor, chunks: list[int]) -> Solution:
        dense_rows = {
            role: getattr(feed_forward, role)[self.adapter.ranks.local_rows(p.shape[0])]
            for role, p in block.feed_forward.items()
        }
        alternate = block.index in self.global_blocks and self.config.requested_sparsity > 0
        return solve_feed_forward(
            feed_forward,
            x,
            target,
            lambda rows, inputs: self._prune(block.feed_forward, rows, dense_rows, inputs),
            iterations=self.config.num_iterations if alternate else 1,
            penalties=self.penalties,
            damping=self.config.damping,
            ranks=self.adapter.ranks,
            chunks=chunks,
            auxiliary_dtype=self.auxiliary_dtype,
            name=f"{block.name}: ",
            on_iteration=lambda iteration, error: (
                self.on_iteration and self.on_iteration(block.index, iteration, error)
            ),
        )

    def _prune(
        self,
        projections: dict[str, Projection],
        targets: dict[str, Tensor],
        dense: dict[str, Tensor],
        inputs: InputStatistics,
    ) -> dict[str, Tensor]:
        """Local solver on projections that share an input, stacked by rows; the skipped ones stay dense."""
        chosen = [name for name in targets if projections[name].pruned]
        if not chosen or self.config.requested_sparsity == 0:
            return {name: dense[name] for name in targets}
        sizes = [targets[name].shape[0] for name in chosen]
        weight = torch.cat([targets[name] for name in chosen])
        patterns = [self.config.build_pattern(projections[name].shape[0], self.adapter.ranks) for name in chosen]
        pattern: Pattern = Stacked(patterns, sizes)
        if self.config.keep_zeros:
            pattern = Containing(pattern, torch.cat([dense[name] for name in chosen]) == 0)
        with self.stopwatch.phase("local_solve"):
            solved = self.local_solve(weight, inputs, pattern, self.config.block_size).split(sizes)
        return {name: dense[name] for name in targets} | dict(zip(chosen, solved, strict=True))

    def _error_as_stored(self, projection: Projection, dense: Tensor, pruned: Tensor, inputs: InputStatistics) -> float:
        """Relative output error, over all ranks, of this rank's rows as the parameter's dtype holds them."""
        parts = torch.stack(relative_error(dense, _as_stored(pruned, projection), inputs.gram)).double()
        self.adapter.ranks.sum_(parts)
        return float(parts[0] / parts[1]) if parts[1] > 0 else 0.0

    def _run(self, block: Block, stream: Stream, go_on: bool = True, **observers: Observer) -> list[Tensor]:
        return run_block(block, stream, self.adapter, self.stopwatch, go_on=go_on, **observers)

    def _timed(self, phase: str, function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def timed(x: Tensor) -> None:
            with self.stopwatch.phase(phase):
                function(x)

        return timed

    def _feed_forward_data(self, block: Block, stream: Stream) -> tuple[Tensor, Tensor, Stream]:
        """Input and output of the feed-forward block, (tokens, d) each, and the block's outputs."""
        first = block.feed_forward.get("gate") or block.feed_forward["up"]
        down = block.feed_forward["down"]
        x, y = TokenBuffer(stream.tokens, first.shape[1]), TokenBuffer(stream.tokens, down.shape[0])
        outputs = self._run(block, stream, on_input=(first.module, x.add), on_output=(down.module, y.add))
        device = device_of(block.module)
        return x.filled(device), y.filled(device), replace(stream, hidden=outputs)

    def _dense_target(self, block: Block, dense: Stream) -> Tensor:
        """Advance the dense stream through the still dense block; its output, or its feed-forward output."""
        y = TokenBuffer(dense.tokens, block.feed_forward["down"].shape[0])
        dense.hidden = self._run(block, dense, on_output=(block.feed_forward["down"].module, y.add))
        return dense.valid_tokens() if self.layout.additive else y.filled(device_of(block.module))

    def _as_feed_forward(self, block: Block, weights: dict[str, Tensor]) -> FeedForward:
        biases = {
            f"{role}_bias": self.adapter.whole_bias(projection) for role, projection in block.feed_forward.items()
        }
        return FeedForward(self.layout.activation, **weights, **biases)  # type: ignore[arg-type]

    def _check_feed_forward(self, block: Block, feed_forward: FeedForward, x: Tensor, y: Tensor) -> None:
        """The table's row describes the block truly: our feed-forward gives the block's own output."""
        sample = slice(0, 64)
        ours, theirs = feed_forward(x[sample].float()), y[sample].float()
        tolerance = 1e-3 if x.dtype == y.dtype == torch.float32 else 0.1
        if len(ours) and not float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-6:
            if not (bool(torch.isfinite(ours).all()) and bool(torch.isfinite(theirs).all())):
                return  # the solver names the projection
            raise UserError(
                f"{block.name}: the architecture table's feed-forward row does not reproduce the block's output (relative "
                f"difference {float((ours - theirs).norm() / theirs.norm()):.2g}). Correct gate, up, down and activation."
            )


def _as_stored(weight: Tensor, projection: Projection) -> Tensor:
    """A float32 weight after the rounding that its parameter's dtype causes."""
    return weight.to(projection.parameter.dtype).float()
