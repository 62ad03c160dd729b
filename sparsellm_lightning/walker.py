"""Block by block through the model: inputs from the already pruned blocks, within a block in the order of evaluation.

At most one block's statistics and auxiliaries are in memory, plus the block inputs of this rank's calibration tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Block, DecoderLayout, Projection, device_of
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import OutOfMemoryError, UserError
from sparsellm_lightning.journal import Entry, Journal
from sparsellm_lightning.patterns import Containing, Pattern, Stacked
from sparsellm_lightning.placement import Placement, Sizes, place, return_free_memory
from sparsellm_lightning.solvers.activations import Entrywise, Fused, preactivation_step
from sparsellm_lightning.solvers.local import LOCAL_SOLVERS, InputStatistics
from sparsellm_lightning.solvers.sparsellm import (
    FeedForward,
    Penalties,
    Solution,
    Work,
    coarse_dtype,
    feed_forward_output,
    solve_feed_forward,
)
from sparsellm_lightning.statistics import FACTOR_WORK, Gram, check_finite, relative_error
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Observer, Stream, TokenBuffer, enter_model, run_block

AUTO_TOKENS = 5  # that carry auxiliaries, per hidden feature
WORTH_COMPILING = 2**29  # entries of the z and s steps of a run; compiling them takes some ten seconds, once


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
        on_phase: called with the name of a phase when it begins.
    """

    def __init__(
        self,
        layout: DecoderLayout,
        config: PruningConfig,
        adapter: StrategyAdapter,
        on_iteration: Callable[[int, int, float], None] | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> None:
        self.layout, self.config, self.adapter = layout, config, adapter
        self.on_iteration = on_iteration
        self.local_name = config.local_solver if config.method == "sparsellm" else config.method
        self.local_solve = LOCAL_SOLVERS[self.local_name]
        self.global_blocks = config.globally_solved(len(layout.blocks))
        device = device_of(layout.model)
        self.stopwatch = Stopwatch(device, on_phase)
        # The paper's raw objective takes p into the weight step: it is then no longer averaged out.
        exact = config.solver_precision == "float32" or not config.scale_free
        self.auxiliary_dtype = torch.float32 if exact else coarse_dtype(device)
        self.step: Entrywise | None = None
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
        windows = self._alternation_windows(int(tokens), sum(window > 0 for window in self.stream.windows))
        self.leading_chunks = None if windows is None else self.stream.chunks_of(windows)
        self.placement, self.sizes = self._place(self.stream, sum(self.stream.windows[:windows]))
        self.stream.move_to(self.placement.inputs)
        first = self.layout.blocks[0].feed_forward
        updates = len(self.global_blocks) * (self.config.num_iterations - 1)
        # Decided by the work of all ranks, so that none of them does otherwise.
        if updates * int(tokens) * first["up"].shape[0] >= WORTH_COMPILING:
            self.step = Fused(preactivation_step(self.layout.activation, "gate" in first))
        return int(tokens)

    @torch.no_grad()
    def walk(self, journal: Journal | None = None) -> Iterator[BlockResult]:
        """Prune every block in place, yielding after each. Call :meth:`enter` first.

        Args:
            journal: blocks that it holds are taken from it, the others are written to it.

        Raises:
            NumericalError: NaN or infinity in activations, or a Gram matrix that cannot be factored.
            OutOfMemoryError: no room for a block's solve.
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
            try:
                errors, layer_errors = self._prune_block(block, stream, dense, entry)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(self._explain_memory(block, error)) from error
            if journal is not None and entry is None:
                journal.write(block, errors, layer_errors)
            stream.arguments[block.index].clear()
            return_free_memory()
            yield BlockResult(block.index, errors, time.perf_counter() - start, layer_errors)

    def _prune_block(
        self, block: Block, stream: Stream, dense: Stream | None, entry: Entry | None
    ) -> tuple[list[float], dict[str, float]]:
        """Prune a block and move the stream behind it; with an entry of the journal, without solving anything."""
        layer_errors: dict[str, float] = {} if entry is None else entry.layer_errors
        dense_target: Tensor | None = None
        if dense is not None:
            dense_target = self._dense_target(block, dense)
        for index, group in enumerate(block.attention):
            if entry is not None:
                for p in group:
                    self.adapter.write_rows(p, entry.rows[p.name].to(p.parameter.device))
            elif any(projection.pruned for projection in group):
                gram = Gram(group[0].shape[1], device_of(block.module))
                observer = (group[0].module, self._timed("statistics", gram.add))
                self._run(block, stream, on_input=observer, until=index)
                self.stopwatch.count("statistics", gram.work)
                with self.stopwatch.phase("statistics"):
                    statistics = gram.mean(self.adapter.ranks)
                check_finite(statistics, group[0].name)
                inputs = InputStatistics(statistics, self.config.damping, group[0].name)
                rows = {p.name: self.adapter.read_rows(p) for p in group}
                pruned = self._prune({p.name: p for p in group}, rows, rows, inputs)
                for p in (p for p in group if p.pruned):
                    self.adapter.write_rows(p, pruned[p.name])
                    layer_errors[p.name] = self._error(rows[p.name], pruned[p.name], inputs)
        if not any(projection.pruned for projection in block.feed_forward.values()):
            stream.hidden = self._run(block, stream)
            return [], layer_errors

        x, y, outputs = self._feed_forward_data(block, stream)
        if self.layout.additive:
            stream.hidden = []  # the block need not run again
        return_free_memory()
        whole = {role: self.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = self._as_feed_forward(block, whole)
        self._check_feed_forward(block, feed_forward, x, y)
        target = y
        if dense_target is not None and block.index in self.global_blocks:
            # What the feed-forward output must be for the block to end where the dense model did.
            target = dense_target - outputs.valid_tokens() + y if self.layout.additive else dense_target
        if entry is None:
            solution = self._solve(block, feed_forward, x, target, stream.chunks())
            for role, p in block.feed_forward.items():
                if p.pruned:
                    weight = getattr(solution.feed_forward, role)
                    self.adapter.write_whole(p, weight)
                    mine = self.adapter.ranks.local_rows(p.shape[0])
                    inputs = solution.hidden if role == "down" else solution.inputs
                    layer_errors[p.name] = self._error(whole[role][mine], weight[mine], inputs)
            errors, output = solution.errors, solution.output
        else:
            for role, p in block.feed_forward.items():
                noted = entry.rows[p.name].to(p.parameter.device)
                whole[role] = self.adapter.ranks.gather_rows(noted, p.shape[0]).float()
                self.adapter.write_whole(p, whole[role])
            errors, chunks = entry.errors, stream.chunks()
            if self.layout.additive:
                after = self._as_feed_forward(block, whole)
                output = feed_forward_output(after, x, chunks, target, self.placement.inputs)
        if self.layout.additive:
            # The residual stream is additive: the block's new output differs by what the feed-forward's does.
            outputs.add_(lambda part: output[part].float() - y[part].float())
            stream.hidden = outputs.hidden
        else:
            stream.hidden = self._run(block, stream)
        return errors, layer_errors

    def _solve(self, block: Block, feed_forward: FeedForward, x: Tensor, target: Tensor, chunks: list[int]) -> Solution:
        dense_rows = {
            role: getattr(feed_forward, role)[self.adapter.ranks.local_rows(p.shape[0])]
            for role, p in block.feed_forward.items()
        }
        alternate = block.index in self.global_blocks and self.config.requested_sparsity > 0
        phase = "alternation" if block.index in self.global_blocks else "statistics"
        work: Work = Counter()
        with self.stopwatch.phase(phase):
            solution = solve_feed_forward(
                feed_forward,
                x,
                target,
                lambda rows, inputs: self._prune(block.feed_forward, rows, dense_rows, inputs),
                iterations=self.config.num_iterations if alternate else 1,
                penalties=self.penalties,
                damping=self.config.damping,
                ranks=self.adapter.ranks,
                chunks=chunks,
                leading_chunks=self.leading_chunks,
                auxiliary_dtype=self.auxiliary_dtype,
                placement=self.placement,
                work=work,
                step=self.step,
                name=f"{block.name}: ",
                on_iteration=lambda iteration, error: self._after_iteration(block, iteration, error),
            )
        for dtype, operations in work.items():
            self.stopwatch.count(phase, operations, dtype)
        return solution

    def _after_iteration(self, block: Block, iteration: int, error: float) -> None:
        return_free_memory()
        if self.on_iteration is not None:
            self.on_iteration(block.index, iteration, error)

    def _prune(
        self,
        projections: dict[str, Projection],
        targets: dict[str, Tensor],
        dense: dict[str, Tensor],
        inputs: InputStatistics,
    ) -> dict[str, Tensor]:
        """Local solver on projections that share an input, stacked by rows; the skipped ones stay dense.

        The result is rounded to what the parameters can hold, so that all that follows sees the weights as they will be stored.
        """
        chosen = [name for name in targets if projections[name].pruned]
        if not chosen or self.config.requested_sparsity == 0:
            return {name: dense[name] for name in targets}
        sizes = [targets[name].shape[0] for name in chosen]
        weight = torch.cat([targets[name] for name in chosen])
        patterns = [self.config.build_pattern(projections[name].shape[0], self.adapter.ranks) for name in chosen]
        pattern: Pattern = Stacked(patterns, sizes)
        if self.config.keep_zeros:
            pattern = Containing(pattern, torch.cat([dense[name] for name in chosen]) == 0)
        rows, columns = weight.shape
        if self.local_name == "sparsegpt":
            self.stopwatch.count("local_solve", rows * columns**2)
            if not inputs.is_factored:
                self.stopwatch.count("local_solve", FACTOR_WORK * columns**3)
        with self.stopwatch.phase("local_solve"):
            solved = self.local_solve(weight, inputs, pattern, self.config.block_size).split(sizes)
        stored = {name: w.to(projections[name].parameter.dtype).float() for name, w in zip(chosen, solved, strict=True)}
        return {name: dense[name] for name in targets} | stored

    def _error(self, dense: Tensor, pruned: Tensor, inputs: InputStatistics) -> float:
        """Relative output error, over all ranks, of this rank's rows."""
        parts = torch.stack(relative_error(dense, pruned, inputs.gram)).double()
        self.adapter.ranks.sum_(parts)
        return float(parts[0] / parts[1]) if parts[1] > 0 else 0.0

    def _run(self, block: Block, stream: Stream, until: int | None = None, **observers: Observer) -> list[Tensor]:
        """Run a block over all batches; ``until``: only up to the observed input of this group of attention projections."""
        window = max(stream.windows, default=0)
        self.stopwatch.count("forward", stream.tokens * block.forward_work(window, until))
        return run_block(block, stream, self.adapter, self.stopwatch, go_on=until is None, **observers)

    def _timed(self, phase: str, function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def timed(x: Tensor) -> None:
            with self.stopwatch.phase(phase):
                function(x)

        return timed

    def _feed_forward_data(self, block: Block, stream: Stream) -> tuple[Tensor, Tensor, Stream]:
        """Input and output of the feed-forward block, (tokens, d) each, and the block's outputs."""
        first = block.feed_forward.get("gate") or block.feed_forward["up"]
        down = block.feed_forward["down"]
        x, y = (TokenBuffer(stream.tokens, size, stream.home) for size in (first.shape[1], down.shape[0]))
        outputs = self._run(block, stream, on_input=(first.module, x.add), on_output=(down.module, y.add))
        return x.filled(), y.filled(), replace(stream, hidden=outputs)

    def _dense_target(self, block: Block, dense: Stream) -> Tensor:
        """Advance the dense stream through the still dense block; its output, or its feed-forward output."""
        y = TokenBuffer(dense.tokens, block.feed_forward["down"].shape[0], dense.home)
        dense.hidden = self._run(block, dense, on_output=(block.feed_forward["down"].module, y.add))
        return dense.valid_tokens() if self.layout.additive else y.filled()

    def _as_feed_forward(self, block: Block, weights: dict[str, Tensor]) -> FeedForward:
        biases: dict[str, Any] = {
            f"{role}_bias": self.adapter.whole_bias(projection) for role, projection in block.feed_forward.items()
        }
        return FeedForward(self.layout.activation, **weights, **biases)

    def _check_feed_forward(self, block: Block, feed_forward: FeedForward, x: Tensor, y: Tensor) -> None:
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

    def _alternation_windows(self, tokens: int, mine: int) -> int | None:
        """How many of this rank's windows carry auxiliaries; None for all.

        Args:
            tokens: over all ranks.
            mine: windows of this rank, without those that only fill up its number of batches.

        Window i being rank ``i mod size``'s, they are the first ones of all windows, however many ranks there are.
        """
        width = self.layout.blocks[0].feed_forward["up"].shape[0]
        wanted = AUTO_TOKENS * width if self.config.alternation_tokens == "auto" else self.config.alternation_tokens
        windows = torch.tensor([mine], device=device_of(self.layout.model))
        self.adapter.ranks.sum_(windows)
        if wanted >= tokens:
            return None
        first = -(-wanted * int(windows) // tokens)
        return len(range(self.adapter.ranks.rank, first, self.adapter.ranks.size))

    def _place(self, stream: Stream, alternation_tokens: int) -> tuple[Placement, Sizes]:
        down = self.layout.blocks[0].feed_forward["down"]
        dim, width = down.shape
        alternates = bool(self.global_blocks) and self.config.num_iterations > 1
        sizes = Sizes.of_block(
            stream.tokens,
            dim,
            width,
            gated="gate" in self.layout.blocks[0].feed_forward,
            auxiliary_tokens=alternation_tokens if alternates else 0,
            streams=7 if self.config.target == "model" else 5,
            itemsize=max((h.element_size() for h in stream.hidden), default=4),
            auxiliary_itemsize=self.auxiliary_dtype.itemsize,
        )
        return place(self.config.memory, sizes, device_of(self.layout.model)), sizes

    def _explain_memory(self, block: Block, error: RuntimeError) -> str:
        return (
            f"{block.name}: out of memory ({str(error).splitlines()[0][:200]}). Besides the model, pruning it takes "
            f"{self.sizes.describe()} for this rank's {self.stream.tokens} calibration tokens; memory is "
            f"{self.config.memory!r}. Lower memory, to give up what can be computed again, or num_calibration_samples, or "
            "use more ranks."
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """The accelerator's own type, or what torch's allocator says on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
