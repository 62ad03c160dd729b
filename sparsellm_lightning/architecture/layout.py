"""A model seen as a list of decoder blocks, each with its projections in the order of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.solvers import Activation


@dataclass(frozen=True)
class Projection:
    """A weight matrix to prune: a parameter of a module, or a part of one.

    Args:
        name: unique in the model. The dotted name of the module; behind it the part of a fused parameter, such as
            ``model.layers.0.mlp.gate_up_proj.gate`` or ``model.layers.0.mlp.experts.3.down``.
        module: that holds the parameter.
        pruned: False where it stays dense.
        shape: (out features, in features) of the matrix, over all ranks.
        parameter_name: attribute of the module.
        transposed: whether the parameter stores (in, out), as ``Conv1D`` does.
        expert: index of the matrix in a parameter of three dimensions. None: the parameter has two.
        rows: start, stop and step of the matrix's rows among the (out, in) rows of the parameter. None: all.
        parts: row counts of the matrices that the model keeps in this one, such as queries, keys and values. Each has its own
            mask. Empty: one matrix.
    """

    name: str
    module: nn.Module
    pruned: bool
    shape: tuple[int, int]
    parameter_name: str = "weight"
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int, int] | None = None
    parts: tuple[int, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module stores it."""
        return getattr(self.module, self.parameter_name)  # type: ignore[no-any-return]

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is the whole parameter."""
        return self.expert is None and self.rows is None

    @property
    def size(self) -> int:
        """Number of weights."""
        rows, columns = self.shape
        return rows * columns

    def of(self, stored: Tensor) -> Tensor:
        """The (out, in) matrix inside the whole parameter, sharing its memory."""
        matrix = stored if self.expert is None else stored[self.expert]
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    @property
    def matrix(self) -> Tensor:
        """The (out, in) matrix, sharing memory with a parameter that is whole on this rank."""
        return self.of(self.parameter.detach())

    def bias_of(self, stored: Tensor) -> Tensor:
        """The (out,) bias inside the whole bias parameter."""
        bias = stored if self.expert is None else stored[self.expert]
        return bias if self.rows is None else bias[slice(*self.rows)]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias parameter as the module stores it, or None."""
        return getattr(self.module, self.bias_name, None)

    @property
    def bias_name(self) -> str:
        """Attribute of the module for the bias."""
        return "bias" if self.parameter_name == "weight" else f"{self.parameter_name}_bias"


def linear_projection(name: str, module: nn.Module, parts: tuple[int, ...] = ()) -> Projection:
    """The projection of a whole ``nn.Linear`` or ``Conv1D``."""
    # From the module's attributes, because the parameter of a sharded module may be a flat piece.
    layer: Any = module
    transposed = isinstance(module, Conv1D)
    shape = (layer.nf, layer.nx) if transposed else (layer.out_features, layer.in_features)
    return Projection(name, module, True, shape, transposed=transposed, parts=parts)


@dataclass(frozen=True)
class Linears:
    """Projections that share one input, solved together by the local solver.

    Args:
        projections: in the order of evaluation.
    """

    projections: list[Projection]

    @property
    def networks(self) -> list[Network]:
        """The feed-forward networks in it: none."""
        return []

    @property
    def observed(self) -> nn.Module:
        """The module whose first argument is the input."""
        return self.projections[0].module


@dataclass(frozen=True)
class Network:
    """A feed-forward network whose function is known: ``φ(gate) ⊙ up`` or ``φ(up)``, then down.

    Args:
        roles: its projections: ``gate`` (where gated), ``up``, ``down``.
        activation: φ.
        observed: the module whose first argument is the network's input.
        output: the module whose output is the network's.
        scale: a change of the network's output changes the block's output ``scale`` times as much. None if the block's output
            depends on it in another way, for instance through a norm.
        up_offset: constant that the model adds to ``up`` (GPT-OSS: 1).
        up_limit: the model clamps ``up`` to ± this, before it adds the constant. None: it does not.
    """

    roles: dict[str, Projection]
    activation: Activation
    observed: nn.Module
    output: nn.Module
    scale: float | None
    up_offset: float = 0.0
    up_limit: float | None = None

    @property
    def networks(self) -> list[Network]:
        """The feed-forward networks in it: itself."""
        return [self]

    @property
    def projections(self) -> list[Projection]:
        """In the order of evaluation."""
        return list(self.roles.values())

    @property
    def first(self) -> list[Projection]:
        """The projections that see the network's input."""
        return [p for role, p in self.roles.items() if role != "down"]


@dataclass(frozen=True)
class Experts:
    """Feed-forward networks of which a router chooses some for every token.

    Args:
        networks: one an expert.
        observed: the module that adds up the weighted outputs. It is called with (hidden states, indices of the chosen experts,
            weights of the chosen experts), or, if ``listed``, with hidden states.
        share: fraction of the experts that a token is routed to.
        listed: whether each expert is a module, the ``output`` of its network. False: their weights are parameters of three
            dimensions of ``observed``.
    """

    networks: list[Network]
    observed: nn.Module
    share: float
    listed: bool = False

    @property
    def projections(self) -> list[Projection]:
        """The projections of all experts, in order."""
        return [p for network in self.networks for p in network.projections]


@dataclass(frozen=True)
class Attention:
    """Attention whose heads can be removed: the others give the same without them, in any order.

    Args:
        inputs: (projection, first row) of the queries, of the keys and of the values. A fused projection appears three times.
        output: the projection of what the heads give.
        heads: number of query heads.
        groups: number of key-value heads.
    """

    inputs: tuple[tuple[Projection, int], ...]
    output: Projection
    heads: int
    groups: int

    @property
    def removable(self) -> int:
        """How many heads can be removed one by one: key-value heads with their query heads, or query heads if all share one."""
        return self.groups if self.groups > 1 else self.heads

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.output.shape[1] // self.heads

    @property
    def projections(self) -> list[Projection]:
        """Each once."""
        return list({p.name: p for p in (*(p for p, _ in self.inputs), self.output)}.values())

    def columns(self, kept: Tensor) -> Tensor:
        """Mask of the kept columns of ``output``, (columns,) bool, for ``kept``, (removable,) bool."""
        return kept.repeat_interleave(self.output.shape[1] // len(kept))

    def spans(self) -> list[tuple[Projection, int, int]]:
        """Rows of the removable heads: (projection, first row, number of rows) for the queries, the keys and the values.

        The queries only, if all query heads share one key-value head, which then stays.
        """
        sizes = (self.heads, self.groups, self.groups)
        places = zip(self.inputs, sizes, strict=True)
        return [(p, first, heads * self.head_size) for (p, first), heads in places if heads % self.removable == 0]

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        """Masks of the kept rows, by name of the projections in :meth:`spans`: (rows,) bool."""
        found: dict[str, Tensor] = {}
        for p, first, size in self.spans():
            mask = found.setdefault(p.name, torch.ones(p.shape[0], dtype=torch.bool, device=kept.device))
            mask[first : first + size] = kept.repeat_interleave(size // len(kept))
        return found


Unit = Linears | Network | Experts
"""What is solved at a time."""


@dataclass(frozen=True)
class Replay:
    """A module inside a block whose output is that of its last projection, so that later forwards need not run the rest of it.

    Args:
        module: attention, mostly.
        last: its last projection.
        returns: number of values that the module returns behind that output. -1: it returns no tuple.
    """

    module: nn.Module
    last: Projection
    returns: int


@dataclass(frozen=True)
class Block:
    """One decoder block.

    Args:
        index: position in the model.
        name: dotted name in the model.
        module: of the block.
        units: what is solved at a time, in the order of evaluation.
        replay: see :class:`Replay`. None: every forward runs the whole block.
        attention: see :class:`Attention`. None: there is none whose heads can be removed.
        returns: values that the module returns behind the hidden states. None: it returns no tuple.
        dense: linear layers that cannot be pruned, with the reason.
        order: permutation of the axes of the hidden states that makes them (batch, sequence, ...). None: they are.
        added_positions: positions of the hidden states that are of no token (learned prompts, further streams).
    """

    index: int
    name: str
    module: nn.Module
    units: list[Unit]
    replay: Replay | None = None
    returns: tuple[Any, ...] | None = None
    dense: dict[str, str] = field(default_factory=dict)
    order: tuple[int, ...] | None = None
    attention: Attention | None = None
    added_positions: int = 0

    def batch_first(self, hidden: Tensor) -> Tensor:
        """Hidden states of the block as (batch, sequence, ...)."""
        return hidden if self.order is None else hidden.permute(self.order)

    def as_block_takes(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, sequence, ...) with the axes that the block takes."""
        return (
            hidden if self.order is None else hidden.permute([self.order.index(axis) for axis in range(hidden.dim())])
        )

    @property
    def sequence_first(self) -> bool:
        """Whether the layers inside see (sequence, batch, features)."""
        return self.order is not None and self.order[:2] == (1, 0)

    @property
    def networks(self) -> list[Network]:
        """The feed-forward networks, experts excluded."""
        return [unit for unit in self.units if isinstance(unit, Network)]

    def projections(self) -> Iterator[Projection]:
        """All projections, in the order in which they are solved."""
        for unit in self.units:
            yield from unit.projections

    def forward_work(self, window: int, until: nn.Module | None = None) -> int:
        """Floating-point operations a token of the matrix products in a forward: projections, and causal attention.

        Args:
            window: number of tokens that attend to each other.
            until: observed module of the first unit that is not evaluated. None: all are.
        """
        work = 0.0
        for unit in self.units:
            if self.replay is not None and self.replay.last in unit.projections:
                # Queries times keys, and weights times values: half of each, because attention is causal.
                work += 2 * window * self.replay.last.shape[1]
            if unit.observed is until:
                break
            work += 2 * sum(p.size for p in unit.projections) * (unit.share if isinstance(unit, Experts) else 1)
        return round(work)


@dataclass(frozen=True)
class DecoderLayout:
    """A model seen as a list of blocks.

    Args:
        model: the ``transformers`` model.
        blocks: in order.
    """

    model: PreTrainedModel
    blocks: list[Block]

    @property
    def predicts(self) -> bool:
        """Whether hidden states behind the last block give the next-token distribution of each token."""
        return self.why_not_predicting is None

    @property
    def why_not_predicting(self) -> str | None:
        """What the model has or lacks, for a message, if it gives no next-token distribution of each token."""
        if self.model.get_output_embeddings() is None:
            return "has no language-model head"
        return "has hidden states that belong to no token" if any(b.added_positions for b in self.blocks) else None

    def projections(self) -> Iterator[Projection]:
        """The projections of all blocks, in order."""
        for block in self.blocks:
            yield from block.projections()

    @property
    def units(self) -> int:
        """Number of hidden units of every block's feed-forward network. 0 if there is no such number, or there are experts."""
        found = {tuple(network.roles["down"].shape[1] for network in block.networks) for block in self.blocks}
        experts = any(isinstance(unit, Experts) for block in self.blocks for unit in block.units)
        widths = next(iter(found), ())
        return widths[0] if len(found) == len(widths) == 1 and not experts else 0

    @property
    def heads(self) -> int:
        """Number of heads of every block's attention that can be removed one by one. 0 if there is no such number."""
        found = {0 if block.attention is None else block.attention.removable for block in self.blocks}
        return found.pop() if len(found) == 1 else 0

    @property
    def widest(self) -> tuple[int, int]:
        """Outputs and inputs of the down projection with most inputs; without feed-forward networks, of any projection."""
        shapes = [network.roles["down"].shape for network in self.networks]
        return max(shapes or [p.shape for p in self.projections()], key=lambda shape: shape[1])

    @property
    def networks(self) -> list[Network]:
        """The feed-forward networks of all blocks, experts included."""
        return [network for block in self.blocks for unit in block.units for network in unit.networks]
