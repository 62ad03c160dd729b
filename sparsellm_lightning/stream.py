"""The model's side of pruning: hidden states into a block, hidden states out, and what its layers see on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architectures import Block, DecoderLayout, device_of
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.placement import empty, moved
from sparsellm_lightning.replay import AttentionReplay
from sparsellm_lightning.solvers.feed_forward import CHUNK
from sparsellm_lightning.stopwatch import Stopwatch, count
from sparsellm_lightning.strategies import StrategyAdapter, patched_forward

Observer = tuple[nn.Module, Callable[[Tensor], None]]


@dataclass
class Stream:
    """Hidden states between two blocks, per calibration batch, and the other arguments the model gives its blocks."""

    hidden: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]  # [block][batch]
    valid: list[Tensor | None]  # (batch, sequence) bool: False where padded
    home: torch.device  # where hidden states are kept between forwards
    fitted: int  # so many of the windows, the first, are fitted; the others are held out
    windows: list[int] = field(init=False)  # valid tokens of each
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.windows = [
            count
            for h, mask in zip(self.hidden, self.valid, strict=True)
            for count in ([h.shape[1]] * h.shape[0] if mask is None else mask.sum(1).tolist())
        ]
        self.tokens = sum(self.windows)

    def move_to(self, home: torch.device) -> None:
        """Keep the hidden states there from now on."""
        self.home = home
        self.hidden = [moved(hidden, home) for hidden in self.hidden]

    def fitted_by_batch(self) -> list[int]:
        """How many of each batch's windows are fitted; the others are held out."""
        left, counts = self.fitted, []
        for hidden in self.hidden:
            counts.append(max(0, min(left, len(hidden))))
            left -= len(hidden)
        return counts

    def part(self, batches: Sequence[int]) -> Stream:
        """These batches only, in ascending order."""
        fitted = self.fitted_by_batch()
        return Stream(
            [self.hidden[index] for index in batches],
            [[arguments[index] for index in batches] if arguments else [] for arguments in self.arguments],
            [self.valid[index] for index in batches],
            self.home,
            sum(fitted[index] for index in batches),
        )

    def chunks(self) -> list[int]:
        """Tokens per step of the solver: a window, or its parts where it is long."""
        return [min(CHUNK, window - start) for window in self.windows for start in range(0, window, CHUNK)]

    def chunks_of(self, windows: int) -> int:
        """How many of :meth:`chunks` the first so many windows have."""
        return sum(-(-window // CHUNK) for window in self.windows[:windows])

    def valid_tokens(self) -> Iterator[Tensor]:
        """The hidden states without padding, (tokens, d), batch by batch."""
        for hidden, mask in zip(self.hidden, self.valid, strict=True):
            yield hidden.flatten(0, 1) if mask is None else hidden[mask.to(hidden.device)]

    def add_(self, change: Tensor) -> None:
        """Add to the hidden states of valid tokens, in place: change is (tokens, d), any dtype."""
        start = 0
        for hidden, mask in zip(self.hidden, self.valid, strict=True):
            count = hidden.shape[0] * hidden.shape[1] if mask is None else int(mask.sum())
            added = change[start : start + count].to(hidden.dtype)
            if mask is None:
                hidden += added.view_as(hidden)
            else:
                hidden[mask.to(hidden.device)] += added
            start += count


def enter_model(
    layout: DecoderLayout,
    batches: Sequence[CalibrationBatch],
    fitted: int,
    adapter: StrategyAdapter,
    stopwatch: Stopwatch,
) -> Stream:
    """Hidden states in front of the first block, and every block's other arguments (masks, rotary embeddings)."""
    recorders = [_Recorder(block.module, run=block.index == 0) for block in layout.blocks]
    with ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder.in_place_of_forward())
        for index, batch in enumerate(batches):
            if index == 1:
                # The first forward sets up what a strategy does lazily, and shows what blocks return. From then on the blocks
                # stand aside, so that none is gathered for nothing.
                for recorder in recorders:
                    stack.enter_context(recorder.in_place_of_block(layout.model))
            with stopwatch.phase("forward"), adapter.forward_context():
                adapter.run_model(layout.model, batch.inputs)
    arguments = [recorder.arguments for recorder in recorders]
    return Stream(recorders[0].hidden, arguments, [b.valid for b in batches], device_of(layout.model), fitted)


def run_block(
    block: Block,
    stream: Stream,
    adapter: StrategyAdapter,
    stopwatch: Stopwatch,
    *,
    on_input: Sequence[Observer] = (),
    on_output: Observer | None = None,
    until: int | None = None,
    replay: AttentionReplay | None = None,
) -> list[Tensor]:
    """Run a block over all batches; observers get each window's valid tokens in and out of a module inside it.

    With ``until``, only the fitted windows are observed, and each forward is broken off where the input of this group of
    attention projections, or, their number being given, of the feed-forward network was seen: what comes after is not computed,
    nor returned. With a ``replay``, the raw inputs are kept in it, or, where the forward goes beyond attention, it is replayed
    from there.
    """
    hidden: Tensor
    mask: Tensor | None = None
    outputs: list[Tensor] = []
    whole = until is None
    attends = until is None or until == len(block.attention)
    left = len(stream.windows) if whole else stream.fitted
    window = max(stream.windows, default=0)
    work, attention_work = block.forward_work(window, until), block.forward_work(window, len(block.attention) - 1)
    device = device_of(block.module)
    with ExitStack() as stack:
        for module, see_input in on_input:

            def before(_: nn.Module, args: tuple[Any, ...], see_input: Callable[[Tensor], None] = see_input) -> None:
                each_window(see_input, args[0], hidden, mask, left)
                if not whole:
                    if replay is not None and not attends:
                        replay.keep(args[0])
                    raise _SeenEnough

            stack.callback(module.register_forward_pre_hook(before).remove)
        if not whole:
            stack.enter_context(patched_forward(block.module, _until_seen(block.module.forward)))
        if on_output is not None:
            module, see_output = on_output
            handle = module.register_forward_hook(lambda _, args, out: each_window(see_output, out, hidden, mask, left))
            stack.callback(handle.remove)
        stack.enter_context(adapter.holding(block.module))
        for index, (hidden, mask, (args, kwargs)) in enumerate(  # noqa: B007 (the observers read mask)
            zip(stream.hidden, stream.valid, stream.arguments[block.index], strict=True)
        ):
            if left <= 0 and not adapter.forward_is_collective:
                break
            hidden = hidden.to(device, non_blocking=True)
            with stopwatch.phase("forward"), adapter.forward_context():
                replayed = attends and replay is not None and replay.replays(index)
                count(hidden.shape[:2].numel() * (work - (attention_work if replayed else 0)))
                with replay.batch(block, index) if replay is not None and attends else nullcontext():
                    output = block.module(hidden, *args, **kwargs)
            left -= len(hidden)
            if whole:
                outputs.append(moved(output[0] if isinstance(output, tuple) else output, stream.home))
    return outputs


def tail_logits(layout: DecoderLayout, hidden: Tensor, adapter: StrategyAdapter) -> Tensor:
    """Logits, (windows, length, vocabulary), of what the model makes of hidden states behind its last block.

    Args:
        layout: the model's blocks.
        hidden: (windows, length, d).
        adapter: of the strategy the model runs under; all ranks call it together.
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device_of(layout.model))
    with ExitStack() as stack:
        for block in layout.blocks:
            stack.enter_context(_Recorder(block.module, run=False, answer=hidden).in_place_of_block(layout.model))
        logits = adapter.logits(layout.model, {"input_ids": ids})
    assert logits is not None
    return logits


class _SeenEnough(Exception):
    """Breaks off a block's forward."""


def _until_seen(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that may be broken off. It returns all the same: FSDP's hooks after it put the shards back."""

    def broken_off(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(hidden, *args, **kwargs)
        except _SeenEnough:
            return hidden

    return broken_off


class TokenBuffer:
    """(tokens, features) on a device, filled in order, in the dtype of what comes in."""

    def __init__(self, tokens: int, features: int, home: torch.device) -> None:
        self.shape, self.home = (tokens, features), home
        self.data: Tensor | None = None
        self.position = 0

    def add(self, x: Tensor) -> None:
        """Append tokens, (n, features)."""
        if self.data is None:
            self.data = empty(self.shape, x.dtype, self.home, x.device)
        self.data[self.position : self.position + len(x)] = x
        self.position += len(x)

    def filled(self) -> Tensor:
        """What was added; empty on a rank without tokens."""
        return torch.empty(0, self.shape[1], device=self.home) if self.data is None else self.data


def each_window(observer: Callable[[Tensor], None], x: Tensor, hidden: Tensor, mask: Tensor | None, count: int) -> None:
    """Give an observer the valid tokens, (tokens, features), of one window after the other, of the first ``count``.

    One at a time, so that sums over tokens are the same however windows are put into batches and on ranks.

    Args:
        observer: of each window.
        x: activations in a block, (batch, sequence, features) or flattened over the first two.
        hidden: the block's input, for the shape.
        mask: (batch, sequence) bool, or None.
        count: windows to observe; all where it is more than there are.
    """
    windows = x.detach().reshape(*hidden.shape[:2], x.shape[-1])
    for row, window in enumerate(windows[: max(count, 0)]):
        observer(window if mask is None else window[mask[row]])


class _Recorder:
    """Records a block's arguments and passes the hidden states through, in place of the block.

    Only the first block really runs (``run``), once, to show whether blocks return a tensor or a tuple. With an ``answer``,
    that is what it passes on, and it records nothing.
    """

    returns_tuple: bool | None = None

    def __init__(self, block: nn.Module, run: bool, answer: Tensor | None = None) -> None:
        self.block, self.run, self.answer = block, run, answer
        self.hidden: list[Tensor] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        if self.answer is not None:
            return (self.answer,) if _Recorder.returns_tuple else self.answer
        # Batches mostly share masks and rotary embeddings: keep one copy.
        previous = self.arguments[-1] if self.arguments else None
        self.arguments.append(_share((rest, kwargs), previous))
        if self.run:
            self.hidden.append(hidden.detach())
            if len(self.hidden) == 1:
                _Recorder.returns_tuple = isinstance(original(hidden, *rest, **kwargs), tuple)
        return (hidden,) if _Recorder.returns_tuple else hidden

    @contextmanager
    def in_place_of_forward(self) -> Iterator[None]:
        """The block is called, with the hooks of its strategy, but does not compute."""
        original = self.block.forward
        with patched_forward(self.block, lambda *args, **kwargs: self.record(original, *args, **kwargs)):
            yield

    @contextmanager
    def in_place_of_block(self, model: nn.Module) -> Iterator[None]:
        """The block is not called at all."""
        parent, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is self.block)
        setattr(parent, name, _StandIn(self))
        try:
            yield
        finally:
            setattr(parent, name, self.block)


class _StandIn(nn.Module):
    """A module that answers as a block does, attributes too, without being it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        vars(self)["recorder"] = recorder  # not as a child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.record(self.recorder.block.forward, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["recorder"].block, name)


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
