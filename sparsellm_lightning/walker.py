"""Block by block through the model: inputs from the already pruned blocks, within a block in the order of evaluation.

At most one block's statistics and auxiliaries are in memory, plus the block inputs of this rank's calibration tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from sparsellm_lightning.architectures import DecoderLayout, device_of
from sparsellm_lightning.block_pruner import BlockPruner, Task
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.journal import Journal
from sparsellm_lightning.layers import LayerPruner
from sparsellm_lightning.placement import Placement, Sizes, explaining_memory, place, return_free_memory
from sparsellm_lightning.products import coarse_dtype
from sparsellm_lightning.replay import AttentionReplay
from sparsellm_lightning.results import BlockResult
from sparsellm_lightning.sensitivity import allocate
from sparsellm_lightning.solvers.activations import Entrywise, Fused, preactivation_step
from sparsellm_lightning.solvers.auxiliaries import Penalties
from sparsellm_lightning.solvers.sparsellm import solve_feed_forward
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Stream, enter_model

AUTO_TOKENS = 5  # that carry auxiliaries, per hidden feature
WORTH_COMPILING = 2**29  # entries of the z and s steps of a run; compiling them takes some ten seconds, once


class Walker:
    """Prunes a model block by block.

    Args:
        layout: the model's blocks.
        config: settings.
        adapter: of the strategy the model runs under.
        on_iteration: called with (block index, iteration, error): of the feed-forward output after each iteration of the
            alternation, or after the local solver; then, as one more iteration, of the block's output after its reconstruction.
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
        self.auxiliary_dtype = coarse_dtype(device, exact)

    @torch.no_grad()
    def enter(self, batches: Sequence[CalibrationBatch], fitted: int | None = None) -> int:
        """Run the calibration inputs up to the first block; returns their valid tokens over all ranks.

        Args:
            batches: this rank's calibration windows, on the model's device.
            fitted: how many of the windows are fitted, the others being held out; all by default.
        """
        if fitted is None:
            fitted = sum(batch.windows for batch in batches)
        self.batches = batches
        self.stream = enter_model(self.layout, batches, fitted, self.adapter, self.stopwatch)
        tokens = torch.tensor([self.stream.tokens], device=device_of(self.layout.model))
        self.adapter.ranks.sum_(tokens)
        windows = self._alternation_windows()
        placement, self.sizes = self._place(self.stream, sum(self.stream.windows[:windows]))
        self.stream.move_to(placement.inputs)
        alternate = partial(
            solve_feed_forward,
            penalties=Penalties(self.config.alpha, self.config.beta, self.config.gamma, self.config.scale_free),
            damping=self.config.damping,
            ranks=self.adapter.ranks,
            chunks=self.stream.chunks(),
            leading_chunks=None if windows is None else self.stream.chunks_of(windows),
            fitted_chunks=self.stream.chunks_of(self.stream.fitted),
            auxiliary_dtype=self.auxiliary_dtype,
            placement=placement,
            step=self._step(int(tokens)),
        )
        self.pruner = BlockPruner(
            self.layout,
            self.config,
            self.adapter,
            self.stopwatch,
            self.layers,
            alternate,
            AttentionReplay(placement.inputs),
            self.on_iteration,
        )
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
            explained = explaining_memory(lambda: self._explain_memory("allocation"))
            with self.stopwatch.phase("allocation"), explained:
                self.layers.sparsities = allocate(self.layout, stream, self.batches, self.config, self.adapter)
        # The dense model's own hidden states travel along only if they are a target.
        dense = replace(stream, hidden=list(stream.hidden)) if self.config.target == "model" else None
        for block in self.layout.blocks:
            start = time.perf_counter()
            entry = None if journal is None else journal.read(block)
            with explaining_memory(partial(self._explain_memory, block.name)):
                result = self.pruner.prune(Task(block, stream, dense, entry))
            result.seconds = time.perf_counter() - start
            if journal is not None and entry is None:
                journal.write(block, result)
            stream.arguments[block.index].clear()
            return_free_memory()
            yield result

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

    def _step(self, tokens: int) -> Entrywise | None:
        """The z and s steps, compiled where that pays. Decided by the tokens of all ranks, so that none does otherwise."""
        first = self.layout.blocks[0].feed_forward
        updates = len(self.global_blocks) * (self.config.num_iterations - 1)
        if updates * tokens * first["up"].shape[0] < WORTH_COMPILING:
            return None
        return Fused(preactivation_step(self.layout.activation, "gate" in first))

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

    def _explain_memory(self, where: str) -> str:
        return (
            f"In {where}: besides the model, pruning a block takes {self.sizes.describe()} for this rank's "
            f"{self.stream.tokens} calibration tokens; memory is {self.config.memory!r}. Lower memory, to give up what can be "
            "computed again, "
            f"num_calibration_samples{', reconstruct.batch_tokens' if self.config.reconstruct else ''}"
            f"{', continuations' if self.config.continuations else ''}, or use more ranks."
        )
