"""What is inside one decoder block, from forwards of it with hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.architecture.blocks import (
    hidden_states,
)
from sparsellm_lightning.architecture.experts import holds_experts, prove_experts, routing_of
from sparsellm_lightning.architecture.feed_forward import (
    Call,
    Proof,
    close,
    effect_on_block,
    prove,
    same,
)
from sparsellm_lightning.architecture.heads import find_attention
from sparsellm_lightning.architecture.layout import (
    Block,
    Experts,
    Linears,
    Network,
    Replay,
    Unit,
    linear_projection,
)
from sparsellm_lightning.architecture.listed import listed_experts, prove_listed
from sparsellm_lightning.architecture.table import ARCHITECTURES, Architecture
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import Activation, find_activation

ROUTES = "it routes tokens to experts"
LARGE = 0.1  # smallest share of a block's parameters from which one that is not pruned is named
WINDOWS, TOKENS = 2, 11  # of the probe. Two windows, so that (batch, sequence) is told from (sequence, batch)


@dataclass
class BlockCall:
    """One call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any = None


def order_of(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The permutation that makes hidden states (batch, sequence, ...). None if they have no such axes.

    A model may add positions to those of the tokens (learned prompts), and axes (several streams).
    """
    for batch, sequence in ((0, 1), (1, 0), (1, 2)):
        if len(shape) > max(2, sequence) and shape[batch] == WINDOWS and shape[sequence] >= TOKENS:
            return (batch, sequence, *(axis for axis in range(len(shape)) if axis not in (batch, sequence)))
    return None


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments: the first one, or ``hidden_states``."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


@dataclass
class Examination:
    """Of one block: a forward with hooks, then one forward for each feed-forward network, whose output is disturbed.

    Args:
        index: of the block.
        model: that holds it.
        module: the block.
        names: of all modules.
        call: the block's arguments in a forward of the model, and what it returned.
        activations: to try.
    """

    index: int
    model: PreTrainedModel
    module: nn.Module
    names: dict[nn.Module, str]
    call: BlockCall
    activations: list[Activation]
    calls: list[Call] = field(default_factory=list)
    experts: dict[str, tuple[int, Experts]] = field(default_factory=dict)
    returned: dict[nn.Module, Any] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    proving: bool = False
    clock: Iterator[int] = field(default_factory=itertools.count)

    @property
    def positions(self) -> int:
        """Positions of a window in the hidden states: its tokens, and what the model adds to them (learned prompts)."""
        hidden = hidden_of(self.call.args, self.call.kwargs)
        assert hidden is not None
        return hidden.shape[self.order[1]]

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation that makes the hidden states (batch, sequence, ...)."""
        hidden = hidden_of(self.call.args, self.call.kwargs)
        assert hidden is not None
        order = order_of(tuple(hidden.shape))
        assert order is not None
        return order

    @property
    def inside(self) -> tuple[int, int]:
        """First two sizes of what the layers inside see."""
        return (self.positions, WINDOWS) if self.order[:2] == (1, 0) else (WINDOWS, self.positions)

    @property
    def _heads(self) -> int | None:
        """Number of query heads that the configuration names."""
        heads = getattr(self.model.config.get_text_config(decoder=True), "num_attention_heads", None)
        return heads if isinstance(heads, int) else None

    def run(self) -> Tensor:
        """The block's hidden states."""
        return hidden_states(self.module(*self.call.args, **self.call.kwargs))

    def block(self) -> Block:
        """What was found."""
        name = self.names[self.module]
        try:
            with self._observed():
                again = self.run()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"A decoder block must run on its own, but {name} of {type(self.model).__name__} fails when it is called "
                f"again: {type(error).__name__}: {error}. Such blocks are not supported."
            ) from error
        if type(self.call.returned) not in (tuple, list) and not isinstance(self.call.returned, Tensor):
            raise UserError(
                f"A decoder block must return its hidden states, alone or first in a tuple, but {name} of "
                f"{type(self.model).__name__} returns a {type(self.call.returned).__name__}. Such blocks are not supported."
            )
        first = hidden_states(self.call.returned)
        if not isinstance(first, Tensor) or not torch.allclose(first, again, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UserError(
                f"A decoder block must give the same output when it is called again, but {name} of "
                f"{type(self.model).__name__} does not. Blocks with a state of their own are not supported."
            )
        row = ARCHITECTURES.get(self.model.config.model_type)
        proofs = self._proofs() if row is None or row.up is None else [self._proof_of(row)]
        units = self._units(proofs)
        self._name_other_weights(units)
        rest = None
        if isinstance(self.call.returned, (tuple, list)):
            rest = tuple(None if isinstance(value, Tensor) else value for value in self.call.returned[1:])
        order = None if self.order == tuple(range(len(self.order))) else self.order
        attention = find_attention(self.run, units, self._heads, self._outermost)
        return Block(self.index, name, self.module, units, self._replay(units), rest, self.dense, order, attention)

    @contextmanager
    def _observed(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for child in self.module.modules():
                if isinstance(child, (nn.Linear, Conv1D)) and self.names[child].count("lora_") == 0:
                    self.count.setdefault(self.names[child], 0)
                    outer = self._outermost(child)
                    hooks.callback(outer.register_forward_hook(self._see_linear(child)).remove)
                elif holds_experts(child):
                    self.dense[self.names[child]] = "its parameters of three dimensions are not experts of a known form"
                    hooks.callback(child.register_forward_hook(self._see_experts, with_kwargs=True).remove)
                elif any(True for _ in child.children()) and child is not self.module:
                    hooks.callback(child.register_forward_hook(self._see_module).remove)
                    if listed_experts(child) is not None:
                        hooks.callback(child.register_forward_hook(self._see_mixture, with_kwargs=True).remove)
            yield

    def _outermost(self, child: nn.Module) -> nn.Module:
        """The module around a linear layer that has its name: a LoRA adapter, or itself."""
        return next(module for module, name in self.names.items() if name == self.names[child])

    def _see_linear(self, child: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        name = self.names[child]

        def see(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if self.proving:
                return
            self.count[name] += 1
            x = args[0] if args else None
            if self.count[name] > 1 or not isinstance(x, Tensor) or not isinstance(y, Tensor):
                return
            leading = tuple(size for size in x.shape[:-1] if size > 1)
            by_token = leading in (self.inside, (WINDOWS * self.positions,))
            # Copies, because an activation may work in place.
            self.calls.append(
                Call(
                    name,
                    child,
                    next(self.clock),
                    x.detach(),
                    x.detach().flatten(0, -2).clone(),
                    y.detach().flatten(0, -2).clone(),
                    by_token,
                )
            )

        return see

    def _see_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = self.names[module]
        routing = routing_of(module, args, kwargs)
        if routing is not None and isinstance(output, Tensor):
            found = prove_experts(name, module, routing, output, self.activations)
            if found is not None:
                self.experts[name] = (next(self.clock), found)
                del self.dense[name]

    def _see_mixture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Prove experts that are modules, and forget the calls of their layers. Sharded weights are whole in the forward."""
        listed = listed_experts(module)
        if self.proving or listed is None:
            return
        name, modules = listed
        self.proving = True
        try:
            found = prove_listed(self.names, module, modules, (args, kwargs, hidden_states(output)), self.activations)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # modules of another kind, which cannot be called so
            return
        finally:
            self.proving = False
        if found is not None:
            self.experts[f"{self.names[module]}.{name}"] = (next(self.clock), found)
            inside = {m for expert in modules for m in expert.modules()}
            self.calls = [call for call in self.calls if call.module not in inside]
            for p in found.projections:
                self.count.pop(self.names[p.module], None)

    def _see_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Of a module that is called twice, the second call is not known to be like the first.
        if self.proving:
            return
        self.returned[module] = None if module in self.returned else output

    def _proofs(self) -> list[Proof]:
        found: list[Proof] = []
        taken: set[str] = set()
        for call in self._prunable():
            proof = prove(call, [c for c in self._prunable() if c.name not in taken], self.activations)
            if proof is not None:
                found.append(proof)
                taken |= proof.calls
        return found

    def _proof_of(self, row: Architecture) -> Proof:
        """The row's feed-forward network, proved."""
        prefix = f"{self.names[self.module]}."
        by_name = {call.name.removeprefix(prefix): call for call in self._prunable()}
        wanted = [path for path in (row.gate, row.up, row.down) if path is not None]
        missing = [path for path in wanted if path not in by_name]
        if missing:
            raise UserError(
                f"The row for {self.model.config.model_type!r} names {', '.join(missing)}, which {prefix[:-1]} does not run as "
                f"a linear layer. It runs {', '.join(by_name)}. Correct the row with register_architecture."
            )
        activations = self.activations if row.activation is None else [find_activation(row.activation)]
        assert row.down is not None
        proof = prove(by_name[row.down], [by_name[path] for path in wanted], activations)
        named = None if row.gate is None else by_name[row.gate]
        if proof is None or proof.up is not by_name[row.up or ""] or proof.gate is not named:
            raise UserError(
                f"{prefix[:-1]}: the row's feed-forward network does not reproduce what {row.down} sees. Correct gate, up, "
                "down and activation with register_architecture."
            )
        return proof

    def _prunable(self) -> list[Call]:
        return [call for call in self.calls if self.count[call.name] == 1]

    def _units(self, proofs: list[Proof]) -> list[Unit]:
        """What is solved at a time, by the first call of each."""
        units: list[tuple[int, Unit]] = []
        in_network = {name for proof in proofs for name in proof.calls}
        routers = self._routers()
        groups: list[list[Call]] = []
        for call in self.calls:
            reason = self._reason_dense(call, routers)
            if reason is not None:
                self.dense[call.name] = reason
            elif call.name not in in_network:
                group = next((group for group in groups if same(group[0], call)), None)
                if group is None:
                    groups.append([call])
                else:
                    group.append(call)
        self.dense |= {name: "no forward calls it" for name, times in self.count.items() if not times}
        for group in groups:
            projections = [linear_projection(call.name, call.module, parts=self._parts(call)) for call in group]
            units.append((group[0].order, Linears(projections)))
        for proof in proofs:
            first = proof.up if proof.gate is None or proof.up.order < proof.gate.order else proof.gate
            units.append((first.order, self._network(proof, first)))
        for order, experts in self.experts.values():
            scale = effect_on_block(self.run, experts.observed, self.model.dtype)
            networks = [replace(network, scale=scale) for network in experts.networks]
            units.append((order, replace(experts, networks=networks)))
        return [unit for _, unit in sorted(units, key=lambda pair: pair[0])]

    def _name_other_weights(self, units: Sequence[Unit]) -> None:
        """Name large parameters that neither a unit nor a layer left dense holds."""
        known = {id(p.parameter) for unit in units for p in unit.projections}
        known |= {id(q) for m, name in self.names.items() if name in self.dense for q in m.parameters()}
        least = LARGE * sum(parameter.numel() for parameter in self.module.parameters())
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in known and parameter.dim() > 1 and parameter.numel() >= least:
                self.dense[f"{self.names[self.module]}.{name}"] = "it is no linear layer"

    def _reason_dense(self, call: Call, routers: set[str]) -> str | None:
        if call.name in routers:
            return ROUTES
        if self.count[call.name] > 1:
            return f"a forward calls it {self.count[call.name]} times"
        if not call.by_token:
            return f"its input of {tuple(call.given.shape)} has no row for each of {WINDOWS} x {self.positions} tokens"
        return None

    def _routers(self) -> set[str]:
        """Linear layers beside experts that have at most one output an expert: routers, and gates of shared experts."""
        found = set()
        for name, (_, experts) in self.experts.items():
            parent = name.rpartition(".")[0]
            for call in self.calls:
                if call.name.startswith(f"{parent}.") and call.y.shape[1] <= len(experts.networks):
                    found.add(call.name)
        return found

    def _network(self, proof: Proof, first: Call) -> Network:
        output = self._outermost(proof.down.module)
        scale = effect_on_block(self.run, output, self.model.dtype)
        return Network(proof.roles(), proof.activation, first.module, output, scale)

    def _parts(self, call: Call) -> tuple[int, ...]:
        """Row counts of queries, keys and values in a layer that gives all three, one behind the other.

        The first token attends only to itself, so that attention returns its values.
        """
        heads = self._heads
        later = [other for other in self.calls if other.order > call.order and other.by_token]
        if heads is None or not later or later[0].x.shape[1] % heads:
            return ()
        width = later[0].x.shape[1]
        size = width // heads
        groups, rest = divmod(call.y.shape[1] - width, 2 * size)
        if rest or groups < 1 or heads % groups:
            return ()
        if self.inside[0] != WINDOWS:
            return ()
        first = slice(0, None, self.positions)  # of each window
        values = call.y[first, -groups * size :].view(WINDOWS, groups, 1, size).expand(-1, -1, heads // groups, -1)
        if not close(values.reshape(WINDOWS, width), later[0].x[first]):
            return ()
        return (width, groups * size, groups * size)

    def _replay(self, units: Sequence[Unit]) -> Replay | None:
        """The outermost module whose output is that of its last linear layer, with other layers and no network before it."""
        singles = {unit.projections[0].name: unit.projections[0] for unit in units if isinstance(unit, Linears)}
        lone = {unit.projections[0].name for unit in units if isinstance(unit, Linears) and len(unit.projections) == 1}
        in_networks = {p.module for unit in units if not isinstance(unit, Linears) for p in unit.projections}
        for module, returned in self.returned.items():
            inside = set(module.modules())
            calls = [call for call in self.calls if call.module in inside]
            first = returned[0] if isinstance(returned, tuple) else returned
            if (
                len(calls) > 1
                and calls[-1].name in lone
                and not inside & in_networks
                and isinstance(first, Tensor)
                and first.shape[:2] == self.inside
                and torch.equal(first.flatten(0, -2), calls[-1].y)
            ):
                more = len(returned) - 1 if isinstance(returned, tuple) else -1
                if self._ignores_what_is_behind(module, first, more):
                    return Replay(module, singles[calls[-1].name], more)
        return None

    def _ignores_what_is_behind(self, module: nn.Module, first: Tensor, more: int) -> bool:
        """Whether the block gives the same output if a module returns nothing but the first value."""
        if more < 1:
            return True
        before = self.run()
        with module.register_forward_hook(lambda *_: (first, *[None] * more)):
            try:
                return torch.equal(self.run(), before)
            except (TypeError, AttributeError):
                return False
