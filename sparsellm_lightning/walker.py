"""Block by block through the model: inputs from the already pruned blocks, within a block in the order of evaluation.

At most one block's statistics and auxiliaries are in memory, plus the block inputs of this rank's calibration tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architectures import Block, DecoderLayout, Projection, device_of
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.patterns import Containing, Pattern, Stacked
from sparsellm_lightning.solvers.local import LOCAL_SOLVERS, InputStatistics
from sparsellm_lightning.solvers.sparsellm import CHUNK, FeedForward, Penalties, Solution, solve_feed_forward
from sparsellm_lightning.statistics import Gram, check_finite, relative_error
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter, patched_forward


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


@dataclass
class _Stream:
    """Hidden states between two blocks, per calibration batch, and the other arguments the model gives its blocks."""

    hidden: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]  # [block][batch]
    valid: list[Tensor | None]  # (batch, sequence) bool: False where padded
    windows: list[int] = field(init=False)  # valid tokens of each
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.windows = [
            count
            for h, mask in zip(self.hidden, self.valid, strict=True)
            for count in ([h.shape[1]] * h.shape[0] if mask is None else mask.sum(1).tolist())
        ]
        self.tokens = sum(self.windows)

    def chunks(self) -> list[int]:
        """Tokens per step of the solver: a window, or its parts where it is long."""
        return [min(CHUNK, window - start) for window in self.windows for start in range(0, window, CHUNK)]


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
        self.penalties = Penalties(config.alpha, config.beta, config.gamma, config.scale_free)

    @torch.no_grad()
    def enter(self, batches: Sequence[CalibrationBatch]) -> int:
        """Run the calibration inputs up to the first block; returns their valid tokens over all ranks.

        Args:
            batches: this rank's calibration windows, on the model's device.
        """
        self.stream = self._enter_model(batches)
        tokens = torch.tensor([self.stream.tokens], device=device_of(self.layout.model))
        self.adapter.ranks.sum_(tokens)
        return int(tokens)

    @torch.no_grad()
    def walk(self) -> Iterator[BlockResult]:
        """Prune every block in place, yielding after each. Call :meth:`enter` first.

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
            errors, layer_errors = self._prune_block(block, stream, dense)
            stream.arguments[block.index].clear()
            yield BlockResult(block.index, errors, time.perf_counter() - start, layer_errors)

    def _prune_block(
        self, block: Block, stream: _Stream, dense: _Stream | None
    ) -> tuple[list[float], dict[str, float]]:
        layer_errors: dict[str, float] = {}
        dense_target: Tensor | None = None
        if dense is not None:
            dense_target = self._dense_target(block, dense)
        for group in block.attention:
            if any(projection.pruned for projection in group):
                gram = Gram(group[0].shape[1], device_of(block.module))
                self._forward(block, stream, on_input=(group[0].module, self._timed("statistics", gram.add)))
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
            stream.hidden = self._forward(block, stream)
            return [], layer_errors

        x, y, outputs = self._feed_forward_data(block, stream)
        whole = {role: self.adapter.whole(p) for role, p in block.feed_forward.items()}
        feed_forward = self._as_feed_forward(block, whole)
        self._check_feed_forward(block, feed_forward, x, y)
        target = y
        if dense_target is not None and block.index in self.global_blocks:
            # What the feed-forward output must be for the block to end where the dense model did.
            target = dense_target - self._valid_tokens(outputs, stream) + y if self.layout.additive else dense_target
        with self.stopwatch.phase("alternation" if block.index in self.global_blocks else "statistics"):
            solution = self._solve(block, feed_forward, x, target, stream.chunks())

        stored = dict(whole)
        for role, p in block.feed_forward.items():
            if p.pruned:
                weight = getattr(solution.feed_forward, role)
                self.adapter.write_whole(p, weight)
                stored[role] = _as_stored(weight, p)
                mine = self.adapter.ranks.local_rows(p.shape[0])
                inputs = solution.hidden if role == "down" else solution.inputs
                layer_errors[p.name] = self._error_as_stored(p, whole[role][mine], weight[mine], inputs)
        if self.layout.additive:
            self._add_change(outputs, stream, self._as_feed_forward(block, stored), x, y)
            stream.hidden = outputs
        else:
            stream.hidden = self._forward(block, stream)
        return solution.errors, layer_errors

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

    # -- the model's side: hidden states in, hidden states out --------------------------------------------------------

    def _enter_model(self, batches: Sequence[CalibrationBatch]) -> _Stream:
        """Hidden states in front of the first block, and every block's other arguments (masks, rotary embeddings)."""
        recorders = [_Recorder(block.module, run=block.index == 0) for block in self.layout.blocks]
        with ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.installed())
            for batch in batches:
                with self.stopwatch.phase("forward"), self.adapter.forward_context():
                    self.adapter.run_model(self.layout.model, batch.inputs)
        valid = [batch.valid for batch in batches]
        return _Stream(recorders[0].hidden, [recorder.arguments for recorder in recorders], valid)

    def _timed(self, phase: str, function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def timed(x: Tensor) -> None:
            with self.stopwatch.phase(phase):
                function(x)

        return timed

    def _forward(
        self,
        block: Block,
        stream: _Stream,
        *,
        on_input: tuple[nn.Module, Callable[[Tensor], None]] | None = None,
        on_output: tuple[nn.Module, Callable[[Tensor], None]] | None = None,
    ) -> list[Tensor]:
        """Run a block over all batches; observers get each window's valid tokens in and out of a module inside it."""
        hidden: Tensor
        mask: Tensor | None = None
        outputs = []
        handles = []
        if on_input is not None:
            module, see_input = on_input
            handles.append(
                module.register_forward_pre_hook(lambda _, args: each_window(see_input, args[0], hidden, mask))
            )
        if on_output is not None:
            module, see_output = on_output
            handles.append(
                module.register_forward_hook(lambda _, args, out: each_window(see_output, out, hidden, mask))
            )
        try:
            with self.adapter.holding(block.module):
                for hidden, mask, (args, kwargs) in zip(  # noqa: B007 (the observers read mask)
                    stream.hidden, stream.valid, stream.arguments[block.index], strict=True
                ):
                    with self.stopwatch.phase("forward"), self.adapter.forward_context():
                        output = block.module(hidden, *args, **kwargs)
                    outputs.append(output[0] if isinstance(output, tuple) else output)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def _feed_forward_data(self, block: Block, stream: _Stream) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Input and output of the feed-forward block, (tokens, d) each, and the block's outputs by batch."""
        first = block.feed_forward.get("gate") or block.feed_forward["up"]
        down = block.feed_forward["down"]
        x, y = _Buffer(stream.tokens, first.shape[1]), _Buffer(stream.tokens, down.shape[0])
        outputs = self._forward(block, stream, on_input=(first.module, x.add), on_output=(down.module, y.add))
        like = next(iter(outputs), torch.empty(0, device=device_of(block.module)))
        return x.filled(like), y.filled(like), outputs

    def _dense_target(self, block: Block, dense: _Stream) -> Tensor:
        """Advance the dense stream through the still dense block; its output, or its feed-forward output."""
        y = _Buffer(dense.tokens, block.feed_forward["down"].shape[0])
        dense.hidden = self._forward(block, dense, on_output=(block.feed_forward["down"].module, y.add))
        if self.layout.additive:
            return self._valid_tokens(dense.hidden, dense)
        return y.filled(torch.empty(0, device=device_of(block.module)))

    def _valid_tokens(self, hidden: list[Tensor], stream: _Stream) -> Tensor:
        flat = [h.flatten(0, 1) if mask is None else h[mask] for h, mask in zip(hidden, stream.valid, strict=True)]
        return torch.cat(flat)

    def _add_change(
        self, outputs: list[Tensor], stream: _Stream, feed_forward: FeedForward, x: Tensor, y: Tensor
    ) -> None:
        """Add FFN_pruned(x) − y to the block's outputs, in place: the residual stream is additive."""
        start = 0
        for output, mask in zip(outputs, stream.valid, strict=True):
            count = output.shape[0] * output.shape[1] if mask is None else int(mask.sum())
            part = slice(start, start + count)
            change = (feed_forward(x[part].float()) - y[part].float()).to(output.dtype)
            if mask is None:
                output += change.view_as(output)
            else:
                output[mask] += change
            start += count

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


class _Recorder:
    """Stands in for a block's forward: records its arguments, and passes the hidden states through.

    Only the first block really runs (``run``), to show whether blocks return a tensor or a tuple.
    """

    returns_tuple = False

    def __init__(self, block: nn.Module, run: bool) -> None:
        self.block, self.run = block, run
        self.hidden: list[Tensor] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        original = self.block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                hidden, rest = kwargs.pop("hidden_states"), ()
            # Batches mostly share masks and rotary embeddings: keep one copy.
            previous = self.arguments[-1] if self.arguments else None
            self.arguments.append(_share((rest, kwargs), previous))
            if self.run:
                self.hidden.append(hidden.detach())
                _Recorder.returns_tuple = isinstance(original(hidden, *rest, **kwargs), tuple)
            return (hidden,) if _Recorder.returns_tuple else hidden

        with patched_forward(self.block, forward):
            yield


class _Buffer:
    """(tokens, features), filled in order, in the dtype of what comes in."""

    def __init__(self, tokens: int, features: int) -> None:
        self.shape = tokens, features
        self.data: Tensor | None = None
        self.position = 0

    def add(self, x: Tensor) -> None:
        if self.data is None:
            self.data = x.new_empty(self.shape)
        self.data[self.position : self.position + len(x)] = x
        self.position += len(x)

    def filled(self, like: Tensor) -> Tensor:
        return like.new_empty(0, self.shape[1]) if self.data is None else self.data


def _as_stored(weight: Tensor, projection: Projection) -> Tensor:
    """A float32 weight after the rounding that its parameter's dtype causes."""
    return weight.to(projection.parameter.dtype).float()


def each_window(observer: Callable[[Tensor], None], x: Tensor, hidden: Tensor, mask: Tensor | None) -> None:
    """Give an observer the valid tokens, (tokens, features), of one window after the other.

    One at a time, so that sums over tokens are the same however windows are put into batches and on ranks.

    Args:
        observer: of each window.
        x: activations in a block, (batch, sequence, features) or flattened over the first two.
        hidden: the block's input, for the shape.
        mask: (batch, sequence) bool, or None.
    """
    windows = x.detach().reshape(*hidden.shape[:2], x.shape[-1])
    for row, window in enumerate(windows):
        observer(window if mask is None else window[mask[row]])


def _share(new: Any, old: Any) -> Any:
    """``new``, with tensors equal to their counterpart in ``old`` replaced by it."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, (tuple, list)):
        olds = old if isinstance(old, (tuple, list)) and len(old) == len(new) else [None] * len(new)
        return type(new)(_share(n, o) for n, o in zip(new, olds, strict=True))
    if isinstance(new, dict):
        return {key: _share(value, old.get(key) if isinstance(old, dict) else None) for key, value in new.items()}
    return new
