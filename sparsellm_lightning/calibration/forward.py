"""Forwards of a model up to its first block, of one block, and of what follows the last block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architecture import (
    Block,
    DecoderLayout,
    Experts,
    Linears,
    Network,
    Routing,
    hidden_states,
    patched_forward,
    routing_in,
)
from sparsellm_lightning.calibration.activations import ActivationCache, Arguments
from sparsellm_lightning.calibration.context import Context
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.runtime import dtype_of_products, phase, room
from sparsellm_lightning.solvers import count, moved

Observer = Callable[[Tensor], None]
"""Called with the valid tokens of one window, (tokens, features)."""


def capture(context: Context, batches: Sequence[CalibrationBatch], fitted: int) -> ActivationCache:
    """Run the model up to its first block. Records the hidden states there, and the other arguments of every block.

    Args:
        context: of the run.
        batches: this rank's calibration windows, on the model's device.
        fitted: number of windows that are fitted: the first ones.
    """
    recorder = _Recorder(context.layout)
    with ExitStack() as stack:
        stack.enter_context(recorder.in_place_of_forwards())
        for index, batch in enumerate(batches):
            if index == 1:
                # The first forward lets the strategy initialise. Afterwards stand-ins replace the blocks, so that no block is
                # gathered in vain.
                stack.enter_context(recorder.in_place_of_blocks())
            with phase("forward"), context.adapter.forward_context():
                context.adapter.run_model(context.layout.model, batch.inputs)
            if index == 0:
                recorder.keep(len(batches), context.config.memory)
    return ActivationCache(
        recorder.hidden,
        recorder.arguments,
        [_at_positions(batch.valid, hidden.shape[1]) for batch, hidden in zip(batches, recorder.hidden, strict=True)],
        context.device,
        fitted,
    )


def _at_positions(valid: Tensor | None, positions: int) -> Tensor | None:
    """The mask at the positions of the hidden states: repeated where a token has several, extended where some are in front."""
    if valid is None or valid.shape[1] == positions:
        return valid
    times, rest = divmod(positions, valid.shape[1])
    if not rest:
        return valid.repeat(1, times)
    return torch.nn.functional.pad(valid, (positions - valid.shape[1], 0), value=True)


def run_block(
    context: Context,
    block: Block,
    cache: ActivationCache,
    *,
    inputs: Sequence[tuple[nn.Module, Observer]] = (),
    outputs: Sequence[tuple[nn.Module, Observer]] = (),
) -> list[Tensor]:
    """The block's output for every batch of the cache.

    Args:
        context: of the run.
        block: runs with its current weights.
        cache: hidden states in front of the block. Not changed.
        inputs: modules inside the block, and observers of their inputs.
        outputs: modules inside the block, and observers of their outputs.
    """
    states: list[Tensor] = []
    with ExitStack() as stack:
        batches = _Batches(context, block, cache, len(cache.windows), until=None)
        for module, observer in inputs:
            stack.callback(module.register_forward_pre_hook(batches.on_input(observer)).remove)
        for module, observer in outputs:
            stack.callback(module.register_forward_hook(batches.on_output(observer)).remove)
        stack.enter_context(context.adapter.holding(block.module))
        stack.enter_context(context.coarse_forwards())
        for returned in batches:
            states.append(moved(block.batch_first(hidden_states(returned)), cache.storage))
    return states


def block_output(block: Block, hidden: Tensor, arguments: Arguments) -> Tensor:
    """A block's output (windows, length, d), with its gradient, for hidden states of that shape and its other arguments."""
    args, kwargs = arguments
    given = block.as_block_takes(hidden.clone())  # a block may work in place
    return block.batch_first(hidden_states(block.module(given, *args, **kwargs)))


def observe_input(
    context: Context, block: Block, cache: ActivationCache, unit: Linears | Network, observer: Observer
) -> None:
    """Show an observer the input of a unit, for the fitted windows. Later parts of the block do not run.

    Args:
        context: of the run.
        block: runs with its current weights.
        cache: hidden states in front of the block. Gets ``replay_inputs`` if the unit is the last projection of the replay.
        unit: of the block.
        observer: of each window.
    """
    keeps = block.replay is not None and unit.projections == [block.replay.last]
    batches = _Batches(context, block, cache, cache.fitted, until=unit.observed)
    show = batches.on_input(observer)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        show(module, args)
        if keeps:
            cache.replay_inputs.append(moved(args[0].detach(), cache.storage))

    _run_until(batches, unit.observed, see)


def observe_routing(
    context: Context, block: Block, cache: ActivationCache, experts: Experts, observer: Callable[[Routing], None]
) -> None:
    """Show an observer what the router decides in every window, the held-out ones too.

    Args:
        context: of the run.
        block: runs with its current weights.
        cache: hidden states in front of the block.
        experts: of the block.
        observer: of the valid tokens of each window.
    """
    batches = _Batches(context, block, cache, len(cache.windows), until=experts.observed)

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = routing_in(experts, args, kwargs)
        assert routing is not None
        batches.show_routing(observer, routing)

    _run_until(batches, experts.observed, see)


def _run_until(batches: _Batches, observed: nn.Module, see: Callable[..., None]) -> None:
    """Run the block up to a module, whose call is seen, for every batch."""

    def see_and_stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, args, kwargs)
        raise _Stop

    adapter, block = batches.context.adapter, batches.block.module
    inner = adapter.inner(block)
    with ExitStack() as stack:
        stack.callback(observed.register_forward_pre_hook(see_and_stop, with_kwargs=True).remove)
        stack.enter_context(patched_forward(inner, _stoppable(inner.forward)))
        stack.enter_context(adapter.holding(block))
        stack.enter_context(batches.context.coarse_forwards())
        for _ in batches:
            pass


def tail_logits(context: Context, hidden: Tensor) -> Tensor:
    """The model's logits, (windows, length, vocabulary), for hidden states behind its last block.

    Args:
        context: of the run. All ranks call this together.
        hidden: (windows, length, d).
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=context.device)
    stand_in = _Recorder(context.layout, answer=hidden)
    with stand_in.in_place_of_blocks():
        logits = context.adapter.logits(context.layout.model, {"input_ids": ids})
    assert logits is not None
    return logits


class _Batches:
    """Forwards of a block, one a batch, with observers of the modules inside.

    Args:
        context, block, cache: as for :func:`run_block`.
        observed: number of windows that observers see: the first ones. Later batches run only if a forward is a collective.
        until: module that is not evaluated, nor what follows it. None: all are.
    """

    def __init__(
        self, context: Context, block: Block, cache: ActivationCache, observed: int, until: nn.Module | None
    ) -> None:
        self.context, self.block, self.cache = context, block, cache
        self.left = observed
        self.shape = torch.Size()  # of the batch that runs, and its valid tokens
        self.mask: Tensor | None = None
        window, replay = max(cache.windows, default=0), block.replay
        self.work = block.forward_work(window, until)
        # A forward that goes beyond the replayed module.
        replays = replay is not None and until not in set(replay.module.modules())
        self.replayed = cache.replay_inputs if replays else []
        self.replayed_work = 0 if replay is None else block.forward_work(window, replay.last.module)

    def __iter__(self) -> Iterator[Any]:
        adapter, device = self.context.adapter, self.context.device
        cache, arguments = self.cache, self.cache.arguments[self.block.index]
        for index, (hidden, mask, (args, kwargs)) in enumerate(zip(cache.hidden, cache.valid, arguments, strict=True)):
            if self.left <= 0 and not adapter.forward_is_collective:
                return
            self.shape, self.mask = hidden.shape[:2], mask
            replays = index < len(self.replayed)
            with phase("forward"), adapter.forward_context(), self._replay(index) if replays else nullcontext():
                work = self.work - self.replayed_work * replays
                count(self.shape.numel() * work, dtype_of_products(next(self.block.module.parameters())))
                # A copy, because a block may work in place.
                given = self.block.as_block_takes(hidden.to(device, non_blocking=True, copy=True))
                returned = self.block.module(given, *args, **kwargs)
            self.left -= len(hidden)
            yield returned

    @contextmanager
    def _replay(self, index: int) -> Iterator[None]:
        """The module's output comes from the input of its last projection. What is before it is not computed."""
        replay = self.block.replay
        assert replay is not None

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = replay.last.module(self.replayed[index].to(replay.last.parameter.device, non_blocking=True))
            # Observed tokens lie as the block had them, one after the other.
            output = output.view(*(self.shape[::-1] if self.block.sequence_first else self.shape), -1)
            return output if replay.returns < 0 else (output, *[None] * replay.returns)

        with patched_forward(replay.module, forward):
            yield

    def on_input(self, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A forward pre-hook that shows a module's input to an observer."""
        return lambda _, args: self._show(observer, args[0])

    def on_output(self, observer: Observer) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook that shows a module's output to an observer."""
        return lambda _, args, output: self._show(observer, output)

    def show_routing(self, observer: Callable[[Routing], None], routing: Routing) -> None:
        """Show the routing of the valid tokens of each window."""
        windows: list[Routing] = []
        if routing.chosen is None:
            experts, _, features = routing.hidden.shape
            by_token = routing.hidden.transpose(0, 1).flatten(1)
            self._show(lambda x: windows.append(Routing(x.view(-1, experts, features).transpose(0, 1))), by_token)
        else:
            parts: list[list[Tensor]] = [[], [], []]
            for part, tensor in zip(parts, (routing.hidden, routing.chosen, routing.weights), strict=True):
                assert tensor is not None
                self._show(part.append, tensor)
            windows = [Routing(*window) for window in zip(*parts, strict=True)]
        for window in windows:
            observer(window)

    def _show(self, observer: Observer, x: Tensor) -> None:
        """Show the valid tokens of each window. One window at a time, so that sums do not depend on batches and ranks."""
        shape = self.shape[::-1] if self.block.sequence_first else self.shape
        windows = x.detach().reshape(*shape, x.shape[-1])
        windows = windows.transpose(0, 1) if self.block.sequence_first else windows
        for row, window in enumerate(windows[: max(self.left, 0)]):
            observer(window if self.mask is None else window[self.mask[row]])


class _Stop(Exception):
    """Ends a block's forward early."""


def _stoppable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that :class:`_Stop` may end. It returns nevertheless, because FSDP's hooks after it free gathered weights."""

    def stopped(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(hidden, *args, **kwargs)
        except _Stop:
            return hidden

    return stopped


class _Recorder:
    """Stands in for a model's blocks: passes hidden states through, and records the blocks' arguments.

    Args:
        layout: the model's blocks.
        answer: returned by every block, and nothing is recorded. None: hidden states pass through.

    Attributes:
        hidden: by batch, in front of the first block.
        arguments: by block and batch.
    """

    def __init__(self, layout: DecoderLayout, answer: Tensor | None = None) -> None:
        self.layout, self.answer = layout, answer
        self.storage: torch.device | None = None  # of hidden states. None: where they are
        self.hidden: list[Tensor] = []
        self.arguments: list[list[Arguments]] = [[] for _ in layout.blocks]

    def call(self, block: Block, *args: Any, **kwargs: Any) -> Any:
        """A block's forward."""
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self.answer is None:
            recorded = self.arguments[block.index]
            # Batches mostly have equal masks and rotary embeddings. One copy is kept.
            recorded.append(_share((rest, kwargs), recorded[-1] if recorded else None))
            if block.index == 0:
                seen = block.batch_first(hidden.detach())
                self.hidden.append(seen if self.storage is None else moved(seen, self.storage))
        passed = hidden if self.answer is None else block.as_block_takes(self.answer)
        return passed if block.returns is None else (passed, *block.returns)

    def keep(self, batches: int, memory: int | str) -> None:
        """Keep hidden states on the host from now on, if ``batches`` of the first one's size do not fit on the device."""
        first = self.hidden[0]
        if first.device.type != "cpu" and batches * first.nbytes > room(memory, first.device):
            self.storage = torch.device("cpu")
            self.hidden = [moved(hidden, self.storage) for hidden in self.hidden]

    @contextmanager
    def in_place_of_forwards(self) -> Iterator[None]:
        """Blocks are called, with the hooks of their strategy, but do not compute."""
        with ExitStack() as stack:
            for block in self.layout.blocks:
                stack.enter_context(patched_forward(block.module, partial(self.call, block)))
            yield

    @contextmanager
    def in_place_of_blocks(self) -> Iterator[None]:
        """Blocks are not called."""
        with ExitStack() as stack:
            for block in self.layout.blocks:
                stack.enter_context(self._in_place_of(block))
            yield

    @contextmanager
    def _in_place_of(self, block: Block) -> Iterator[None]:
        modules = self.layout.model.modules()
        parent, name = next((m, n) for m in modules for n, child in m.named_children() if child is block.module)
        setattr(parent, name, _StandIn(self, block))
        try:
            yield
        finally:
            setattr(parent, name, block.module)


class _StandIn(nn.Module):
    """A module with a block's attributes that calls a recorder instead of the block."""

    def __init__(self, recorder: _Recorder, block: Block) -> None:
        super().__init__()
        vars(self)["recorder"], vars(self)["block"] = recorder, block  # not as children

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["recorder"].call(self.__dict__["block"], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"].module, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """The block's, because a model may ask for it to choose a block's arguments."""
        return type(self.__dict__["block"].module)


def _share(new: Any, old: Any) -> Any:
    """``new``, in which tensors that equal their counterpart in ``old`` are replaced by it.

    A mapping stays the same object, because blocks may leave something in it for later ones.
    """
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, (tuple, list)):
        olds = old if isinstance(old, (tuple, list)) and len(old) == len(new) else [None] * len(new)
        shared = [_share(n, o) for n, o in zip(new, olds, strict=True)]
        return new._make(shared) if hasattr(new, "_make") else type(new)(shared)
    if isinstance(new, dict):
        for key, value in new.items():
            new[key] = _share(value, old.get(key) if isinstance(old, dict) else None)
    return new
