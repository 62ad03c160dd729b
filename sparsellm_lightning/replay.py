"""Not computing a block's attention twice: its output from what its last projection saw a forward earlier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Block
from sparsellm_lightning.placement import moved
from sparsellm_lightning.strategies import patched_forward


class AttentionReplay:
    """Inputs of the last attention projection by batch, and the attention's output from them.

    Where the output of that projection is the first thing that the attention module returns, which is looked at once, later
    forwards need not compute queries, keys, values and what they attend to: they are the same, and only the projection's
    weight has changed. Elsewhere forwards run as they are.

    Args:
        home: where the inputs are kept.
    """

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self.inputs: list[Tensor] = []
        self._others: int | None = None  # what attention returns besides its output; -1: the output is not in a tuple
        self._fails = False

    def keep(self, x: Tensor) -> None:
        """Note the input of the next batch."""
        if not self._fails:
            self.inputs.append(moved(x.detach(), self.home))

    def replays(self, index: int) -> bool:
        """Whether the attention of this batch will be left out."""
        return self._others is not None and index < len(self.inputs)

    @contextmanager
    def batch(self, block: Block, index: int) -> Iterator[None]:
        """Context of a forward of the block: attention is replayed, or looked at while it runs. Gives the input up."""
        attention, last = block.attention_module, block.attention[-1][0].module
        if attention is None or index >= len(self.inputs):
            yield
        elif self._others is None:
            seen: list[Any] = []
            hooks = [m.register_forward_hook(lambda _, args, output: seen.append(output)) for m in (last, attention)]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
            if len(seen) == 2:  # else the forward was broken off before
                self._learn(*seen)
        else:
            others = self._others

            def replayed(*args: Any, **kwargs: Any) -> Any:
                x, self.inputs[index] = self.inputs[index], torch.empty(0)
                output = last(x.to(block.attention[-1][0].parameter.device, non_blocking=True))
                return output if others < 0 else (output, *[None] * others)

            with patched_forward(attention, replayed):
                yield

    def _learn(self, projected: Tensor, returned: Any) -> None:
        first = returned[0] if isinstance(returned, tuple) else returned
        if isinstance(first, Tensor) and first.shape == projected.shape and torch.equal(first, projected):
            self._others = len(returned) - 1 if isinstance(returned, tuple) else -1
        else:
            self._fails = True
            self.inputs.clear()
