"""Block by block through the model: inputs from the already pruned blocks, within a block in the order of evaluation.

At most one block's statistics and auxiliaries are in memory, plus the block inputs of this rank's calibration tokens.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Block, DecoderLayout, device_of
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import OutOfMemoryError, UserError
from sparsellm_lightning.journal import Entry, Journal
from sparsellm_lightning.layers import LayerPruner
from sparsellm_lightning.masks import local_tensor
from sparsellm_lightning.placement import Placement, Sizes, place, return_free_memory
from sparsellm_lightning.ranks import SINGLE
from sparsellm_lightning.reconstruct import Reconstructor
from sparsellm_lightning.replay import AttentionReplay
from sparsellm_lightning.results import BlockResult
from sparsellm_lightning.sensitivity import allocate
from sparsellm_lightning.solvers.activations import Entrywise, Fused, preactivation_step
from sparsellm_lightning.solvers.auxiliaries import Penalties, coarse_dtype
from sparsellm_lightning.solvers.feed_forward import FeedForward, Tokens, Work, change_of_output
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.solvers.sparsellm import Solution, solve_feed_forward
from sparsellm_lightning.statistics import Gram, check_finite
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Stream, TokenBuffer, enter_model, run_block

AUTO_TOKENS = 5  # that carry auxiliaries, per hidden feature
WORTH_COMPILING = 2**29  # entries of the z and s steps of a run; compiling them takes some ten seconds, once


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
        self.global_blocks = config.globally_solved(len(layout.blocks))
        device = device_of(layout.model)
        self.stopwatch = Stopwatch(device, on_phase)
        self.layers = LayerPruner(config, adapter, self.stopwatch)
        # The paper's raw objective takes p into the weight step: it is then no longer averaged out.
        exact = config.solver_precision == "float32" or not config.scale_free
        self.auxiliary_dtype = torch.float32 if exact else coarse_dtype(device)
        self.step: Entrywise | None = None
        self.penalties = Penalties(config.alpha, config.beta, config.gamma, config.scale_free)

    @torch.no_grad()
    def enter(self, batches: Sequence[CalibrationBatch], fitted: int | None = None) -> int:
        """Run the calibration inputs up to the first block; returns their valid tokens over all ranks.

        Args:
            batches: this rank's calibration windows, on the model's device.
            fitted: how many of the windows are fitted, the others being held out; all by default.
        """
        if fitted is None:
            fitted = sum(batch.windows for batch in batches)
        self.stream = enter_model(self.layout, batches, fitted, self.adapter, self.stopwatch)
        tokens = torch.tensor([self.stream.tokens], device=device_of(self.layout.model))
        self.adapter.ranks.sum_(tokens)
        windows = self._alternation_windows()
        self.leading_chunks = None if windows is None else self.stream.chunks_of(windows)
        self.placement, self.sizes = self._place(self.stream, sum(self.stream.windows[:windows]))
        self.stream.move_to(self.placement.inputs)
        self.replay = AttentionReplay(self.placement.inputs)
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
        if self.config.allocation != "uniform" and self.config.requested_sparsity > 0:
            with self.stopwatch.phase("allocation"):
                self.layers.sparsities = allocate(self.layout, stream, self.config, self.adapter)
        # The dense model's own hidden states travel along only if they are a target.
        dense = replace(stream, hidden=list(stream.hidden)) if self.config.target == "model" else None
        for block in self.layout.blocks:
            start = time.perf_counter()
            entry = None if journal is None else journal.read(block)
            result = BlockResult(block.index) if entry is None else entry.result
            try:
                self._prune_block(block, stream, dense, entry, result)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(self._explain_memory(block, error)) from error
            result.seconds = time.perf_counter() - start
            if journal is not None and entry is None:
                journal.write(block, result)
            stream.arguments[block.index].clear()
            return_free_memory()
            yield result

    def _prune_block(
        self, block: Block, stream: Stream, dense: Stream | None, entry: Entry | None, result: BlockResult
    ) -> None:
        """Prune a block and move the stream behind it; with an entry of the journal, without solving anything."""
        dense_y = None if dense is None else self._advance(block, dense)
        if not self.config.reconstruct or not any(p.pruned for p in block.projections()):
            self._solve_block(block, stream, dense, dense_y, entry, result)
            return
        before = stream.hidden
        if entry is None:
            goal = self._run(block, stream) if dense is None else dense.hidden
            self._solve_block(block, stream, dense, dense_y, None, result, is_final=False)
            stream.hidden = before
            self._reconstruct(block, stream, goal, result)
            del goal
        else:
            for name, parameter in block.module.named_parameters():
                local_tensor(parameter).copy_(entry.tensors[name])
        stream.hidden = self._run(block, stream)

    def _solve_block(
        self,
        block: Block,
        stream: Stream,
        dense: Stream | None,
        dense_y: Tensor | None,
        entry: Entry | None,
        result: BlockResult,
        is_final: bool = True,
    ) -> None:
        """Prune a block without gradients and, where that is final, move the stream behind it.

        Args:
            dense: the dense model's stream, behind the block already, where that is a target.
            dense_y: its feed-forward output, where it does not end in the residual stream.
        """
        self.replay.inputs.clear()  # of a block whose feed-forward network was skipped
        for index, group in enumerate(block.attention):
            if entry is not None:
                for p in group:
                    self.adapter.write_rows(p, entry.tensors[p.name].to(p.parameter.device))
            elif any(projection.pruned for projection in group):
                self._prune_attention(block, index, stream, result)
        if any(projection.pruned for projection in block.feed_forward.values()):
            self._prune_feed_forward(block, stream, dense, dense_y, entry, result, is_final)
        elif is_final:
            stream.hidden = self._run(block, stream)

    def _reconstruct(self, block: Block, stream: Stream, goal: list[Tensor], result: BlockResult) -> None:
        """Tune the kept weights of a pruned block towards a goal, hidden states behind it."""
        assert self.config.reconstruct
        device = device_of(block.module)
        exact = self.config.solver_precision == "float32"
        dtype = torch.float32 if exact else coarse_dtype(device)
        with self.stopwatch.phase("reconstruction"):
            reconstructor = Reconstructor(
                block,
                stream,
                goal,
                self.adapter,
                self.config.reconstruct,
                None if dtype == torch.float32 else dtype,
                self.config.seed,
            )
            (before, after), steps = reconstructor.tune()
        work = block.forward_work(max(stream.windows, default=0))
        self.stopwatch.count("reconstruction", 3 * reconstructor.tokens_seen * work, dtype)
        result.reconstruction = {
            "steps": steps,
            "fitted": [before[0], after[0]],
            "held_out": [None if math.isnan(errors[1]) else errors[1] for errors in (before, after)],
        }

    def _prune_attention(self, block: Block, index: int, stream: Stream, result: BlockResult) -> None:
        """Prune a group of attention projections, which share their input."""
        group = block.attention[index]
        gram = Gram(group[0].shape[1], device_of(block.module))
        observer = (group[0].module, self._timed("statistics", gram.add))
        # The one projection behind the attention is the last that changes it.
        ends = 0 < index == len(block.attention) - 1 and len(group) == 1
        self._run(block, stream, on_input=[observer], until=index, replay=self.replay if ends else None)
        self.stopwatch.count("statistics", gram.work)
        with self.stopwatch.phase("statistics"):
            statistics = gram.mean(self.adapter.ranks)
        check_finite(statistics, group[0].name)
        inputs = InputStatistics(statistics, self.config.damping, group[0].name)
        rows = {p.name: self.adapter.read_rows(p) for p in group}
        pruned = self.layers.prune({p.name: p for p in group}, rows, rows, inputs)
        for p in (p for p in group if p.pruned):
            self.adapter.write_rows(p, pruned[p.name])
            result.layer_errors[p.name] = self.layers.error(rows[p.name], pruned[p.name], inputs)

    def _prune_feed_forward(
        self,
        block: Block,
        stream: Stream,
        dense: Stream | None,
        dense_y: Tensor | None,
        entry: Entry | None,
        result: BlockResult,
        is_final: bool,
    ) -> None:
        """Prune a feed-forward network, the block's attention being done.

        Arguments as of :meth:`_solve_block`.
        """
        x, y, outputs = self._feed_forward_data(block, stream)
        if self.layout.additive:
            stream.hidden = []  # the block need not run again
        return_free_memory()
        whole = {role: self.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = self._as_feed_forward(block, whole)
        self._check_feed_forward(block, feed_forward, x, y)
        if dense is not None and block.index in self.global_blocks:
            if dense_y is not None:
                y = dense_y
            else:
                # What the feed-forward output must be for the block to end where the dense model did.
                start = 0
                for wanted, given in zip(dense.valid_tokens(), outputs.valid_tokens(), strict=True):
                    y[start : start + len(wanted)] += wanted - given
                    start += len(wanted)
                outputs = replace(dense, hidden=[hidden.clone() for hidden in dense.hidden])
        if entry is None:
            solution = self._solve(block, feed_forward, x, y, stream)
            for role, p in block.feed_forward.items():
                if p.pruned:
                    weight = getattr(solution.feed_forward, role)
                    self.adapter.write_whole(p, weight)
                    mine = self.adapter.ranks.local_rows(p.shape[0])
                    inputs = solution.hidden if role == "down" else solution.inputs
                    result.layer_errors[p.name] = self.layers.error(whole[role][mine], weight[mine], inputs)
            result.errors, result.held_out_errors = solution.errors, solution.held_out_errors
            change = solution.change
        else:
            for role, p in block.feed_forward.items():
                noted = entry.tensors[p.name].to(p.parameter.device)
                whole[role] = self.adapter.ranks.gather_rows(noted, p.shape[0]).float()
                self.adapter.write_whole(p, whole[role])
            after = self._as_feed_forward(block, whole)
            tokens = Tokens(x, y, after.down_bias, stream.chunks(), after.up.device)
            change, _ = change_of_output(after, tokens, 0, SINGLE, Counter(), y)
        if not is_final:
            return
        if self.layout.additive:
            # The residual stream is additive: the block ends where y would have brought it, and the change of y.
            outputs.add_(change)
            stream.hidden = outputs.hidden
        else:
            stream.hidden = self._run(block, stream)

    def _solve(self, block: Block, feed_forward: FeedForward, x: Tensor, y: Tensor, stream: Stream) -> Solution:
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
                y,
                lambda rows, inputs: self.layers.prune(block.feed_forward, rows, dense_rows, inputs),
                iterations=self.config.num_iterations if alternate else 1,
                penalties=self.penalties,
                damping=self.config.damping,
                ranks=self.adapter.ranks,
                chunks=stream.chunks(),
                leading_chunks=self.leading_chunks,
                fitted_chunks=stream.chunks_of(stream.fitted),
                auxiliary_dtype=self.auxiliary_dtype,
                placement=self.placement,
                work=work,
                step=self.step,
                reuse_target=True,
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

    def _run(
        self,
        block: Block,
        stream: Stream,
        until: int | None = None,
        replay: AttentionReplay | None = None,
        **observers: Any,
    ) -> list[Tensor]:
        """Run a block over all batches; ``until``: only up to the observed input of this group of attention projections."""
        window = max(stream.windows, default=0)
        tokens = stream.tokens if until is None else sum(stream.windows[: stream.fitted])
        self.stopwatch.count("forward", tokens * block.forward_work(window, until))
        if until is None and replay is not None and replay.replays(0):
            replayed = sum(hidden.shape[:2].numel() for hidden in stream.hidden[: len(replay.inputs)])
            self.stopwatch.count("forward", -replayed * block.forward_work(window, len(block.attention) - 1))
        return run_block(
            block, stream, self.adapter, self.stopwatch, statistics_only=until is not None, replay=replay, **observers
        )

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
        outputs = self._run(
            block, stream, on_input=[(first.module, x.add)], on_output=(down.module, y.add), replay=self.replay
        )
        self.replay.inputs.clear()
        return x.filled(), y.filled(), replace(stream, hidden=outputs)

    def _advance(self, block: Block, dense: Stream) -> Tensor | None:
        """Move the dense stream behind the still dense block; its feed-forward output, where something follows that."""
        if self.layout.additive:
            dense.hidden = self._run(block, dense)
            return None
        y = TokenBuffer(dense.tokens, block.feed_forward["down"].shape[0], dense.home)
        dense.hidden = self._run(block, dense, on_output=(block.feed_forward["down"].module, y.add))
        return y.filled()

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

    def _alternation_windows(self) -> int | None:
        """How many of this rank's windows carry auxiliaries; None for all that are fitted.

        Window i being rank ``i mod size``'s, they are the first ones of all windows, however many ranks there are.
        """
        width = self.layout.blocks[0].feed_forward["up"].shape[0]
        wanted = AUTO_TOKENS * width if self.config.alternation_tokens == "auto" else self.config.alternation_tokens
        fitted = self.stream.windows[: self.stream.fitted]
        counts = torch.tensor([sum(fitted), sum(tokens > 0 for tokens in fitted)], device=device_of(self.layout.model))
        self.adapter.ranks.sum_(counts)
        tokens, windows = counts.tolist()
        if wanted >= tokens:
            return None
        first = -(-wanted * windows // tokens)
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
            # Input and output of the block and of its feed-forward network; the goal, and the dense model's own stream.
            streams=4 + 2 * bool(self.config.reconstruct) + 2 * (self.config.target == "model"),
            itemsize=max((h.element_size() for h in stream.hidden), default=4),
            auxiliary_itemsize=self.auxiliary_dtype.itemsize,
        )
        return place(self.config.memory, sizes, device_of(self.layout.model)), sizes

    def _explain_memory(self, block: Block, error: RuntimeError) -> str:
        return (
            f"{block.name}: out of memory ({str(error).splitlines()[0][:200]}). Besides the model, pruning it takes "
            f"{self.sizes.describe()} for this rank's {self.stream.tokens} calibration tokens; memory is "
            f"{self.config.memory!r}. Lower memory, to give up what can be computed again, num_calibration_samples"
            f"{', reconstruct.batch_tokens' if self.config.reconstruct else ''}, or use more ranks."
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """The accelerator's own type, or what torch's allocator says on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
