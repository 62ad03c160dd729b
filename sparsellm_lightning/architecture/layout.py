"""A model seen as a list of decoder blocks, each with its projections in the order of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.solvers import Activation


@dataclass(frozen=True)
class Projection:
    """One weight to prune.

    Args:
        name: dotted name in the model, without ``.weight``.
        module: ``nn.Linear``, or ``Conv1D``, whose weight is stored transposed.
        pruned: False where ``ignore`` leaves it dense.
    """

    name: str
    module: nn.Module
    pruned: bool

    @property
    def transposed(self) -> bool:
        """Whether the module stores (in, out) rather than (out, in)."""
        return isinstance(self.module, Conv1D)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module stores it."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features) of the whole weight."""
        # From the module, because the parameter of a sharded module may be a flat piece.
        module: Any = self.module
        return (module.nf, module.nx) if self.transposed else (module.out_features, module.in_features)

    @property
    def size(self) -> int:
        """Number of weights."""
        rows, columns = self.shape
        return rows * columns

    @property
    def bias(self) -> Tensor | None:
        """The bias as the module stores it, or None."""
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Args:
        index: position in the model.
        name: dotted name in the model.
        module: of the block.
        attention: its attention projections, grouped by shared input, in the order of evaluation.
        feed_forward: its feed-forward projections by role: ``gate`` (where gated), ``up``, ``down``.
        attention_module: the module inside that holds the attention projections and not the feed-forward ones. None if there is
            no such module.
    """

    index: int
    name: str
    module: nn.Module
    attention: list[list[Projection]]
    feed_forward: dict[str, Projection]
    attention_module: nn.Module | None = None

    @property
    def feed_forward_input(self) -> Projection:
        """A projection that sees the input of the feed-forward network."""
        return self.feed_forward.get("gate") or self.feed_forward["up"]

    @property
    def groups(self) -> list[list[Projection]]:
        """All projections, grouped by shared input, in the order of evaluation."""
        before = [p for role, p in self.feed_forward.items() if role != "down"]
        return [*self.attention, before, [self.feed_forward["down"]]]

    def projections(self) -> Iterator[Projection]:
        """All projections, in the order of evaluation."""
        for group in self.groups:
            yield from group

    def forward_work(self, window: int, until: int | None = None) -> int:
        """Floating-point operations a token of the matrix products in a forward: projections, and causal attention.

        Args:
            window: number of tokens that attend to each other.
            until: index in :attr:`groups` of the first group that is not evaluated. None: all are.
        """
        groups = self.groups[:until]
        # Queries times keys, and weights times values: half of each, because attention is causal.
        attends = until is None or until >= max(len(self.attention) - 1, 1)
        attention = 2 * window * self.attention[-1][0].shape[1] if attends else 0
        return attention + sum(2 * p.size for group in groups for p in group)


@dataclass(frozen=True)
class DecoderLayout:
    """A model seen as a list of blocks.

    Args:
        model: the ``transformers`` model.
        blocks: in order.
        activation: of every feed-forward network.
        additive: see :class:`~sparsellm_lightning.architecture.Architecture`.
    """

    model: PreTrainedModel
    blocks: list[Block]
    activation: Activation
    additive: bool

    def projections(self) -> Iterator[Projection]:
        """The projections of all blocks, in order."""
        for block in self.blocks:
            yield from block.projections()
