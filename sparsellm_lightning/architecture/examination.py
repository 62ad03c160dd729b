"""What can be pruned inside one decoder block, from what was observed in a forward of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architecture.experts import Routing
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
from sparsellm_lightning.architecture.listed import routing_in
from sparsellm_lightning.architecture.observation import NO_TENSOR, TOKENS, WINDOWS, Observation
from sparsellm_lightning.architecture.table import ARCHITECTURES, Architecture
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import find_activation

ROUTES = "it routes tokens to experts"
_EXPERTS = re.compile(r"num_(local_|routed_)?experts$|n_routed_experts$")  # their number in configurations
LARGE = 0.1  # smallest share of a block's parameters from which one that is not pruned is named


@dataclass
class Examination:
    """Finds what the layers of an observed block are. Runs further forwards of the block: two for each feed-forward network or
    mixture (see :func:`effect_on_block`), and more for routers, attention heads and replays.

    Args:
        index: of the block.
        seen: the observation.
    """

    index: int
    seen: Observation

    @property
    def _heads(self) -> int | None:
        """Number of query heads that the configuration names."""
        try:
            heads = getattr(self.seen.model.config.get_text_config(decoder=True), "num_attention_heads", None)
        except RuntimeError:  # transformers refuses to name one where layers differ
            heads = None
        return heads if isinstance(heads, int) else None

    def block(self) -> Block:
        """What was found."""
        seen = self.seen
        row = ARCHITECTURES.get(seen.model.config.model_type)
        proofs = self._proofs() if row is None or row.up is None else [self._proof_of(row)]
        units = self._units(proofs)
        self._name_other_weights(units)
        rest = None
        if isinstance(seen.call.returned, (tuple, list)):
            rest = tuple(None if isinstance(value, Tensor) else value for value in seen.call.returned[1:])
        order = None if seen.order == tuple(range(len(seen.order))) else seen.order
        attention = find_attention(seen.run, units, self._heads, seen.outermost)
        replay, added = self._replay(units), seen.positions - TOKENS
        return Block(self.index, seen.name, seen.module, units, replay, rest, seen.dense, order, attention, added)

    def _proofs(self) -> list[Proof]:
        found: list[Proof] = []
        taken: set[str] = set()
        for call in self._prunable():
            others = [c for c in self._prunable() if c.name not in taken]
            proof = prove(call, others, self.seen.activations, self._holder(call))
            if proof is not None:
                found.append(proof)
                taken |= proof.calls
        return found

    def _proof_of(self, row: Architecture) -> Proof:
        """The row's feed-forward network, proved."""
        prefix = f"{self.seen.name}."
        by_name = {call.name.removeprefix(prefix): call for call in self._prunable()}
        wanted = [path for path in (row.gate, row.up, row.down) if path is not None]
        missing = [path for path in wanted if path not in by_name]
        if missing:
            raise UserError(
                f"The row for {self.seen.model.config.model_type!r} names {', '.join(missing)}, which {self.seen.name} does "
                f"not run as a linear layer. It runs {', '.join(by_name)}. Correct the row with register_architecture."
            )
        try:
            activations = self.seen.activations if row.activation is None else [find_activation(row.activation)]
        except KeyError:
            raise UserError(
                f"The row for {self.seen.model.config.model_type!r} must name an activation of transformers, got "
                f"{row.activation!r}. Correct the row with register_architecture."
            ) from None
        assert row.down is not None
        down = by_name[row.down]
        proof = prove(down, [by_name[path] for path in wanted], activations, self._holder(down))
        named = None if row.gate is None else by_name[row.gate]
        if proof is None or proof.up is not by_name[row.up or ""] or proof.gate is not named:
            raise UserError(
                f"{self.seen.name}: the row's feed-forward network does not reproduce what {row.down} sees. Correct gate, up, "
                "down and activation with register_architecture."
            )
        return proof

    def _holder(self, call: Call) -> nn.Module | None:
        """The module that holds a linear layer."""
        wanted = call.name.rpartition(".")[0]
        return next((module for module, name in self.seen.names.items() if name == wanted), None)

    def _prunable(self) -> list[Call]:
        return [call for call in self.seen.calls if self.seen.count[call.name] == 1]

    def _units(self, proofs: list[Proof]) -> list[Unit]:
        """What is solved at a time, by the first call of each."""
        units: list[tuple[int, Unit]] = []
        deciding = self._deciding()
        proofs = [proof for proof in proofs if not proof.calls & deciding]
        in_network = {name for proof in proofs for name in proof.calls}
        routers = deciding | (self._routers() - in_network)
        groups: list[list[Call]] = []
        for call in self.seen.calls:
            reason = self._reason_dense(call, routers)
            if reason is not None:
                self.seen.dense[call.name] = reason
            elif call.name not in in_network:
                group = next((group for group in groups if same(group[0], call)), None)
                if group is None:
                    groups.append([call])
                else:
                    group.append(call)
        self.seen.dense |= {name: "no forward calls it" for name, times in self.seen.count.items() if not times}
        numbers = self._numbers_of_experts()
        for module, name in self.seen.names.items():
            if self.seen.dense.get(name) == NO_TENSOR and getattr(module, "out_features", None) in numbers:
                self.seen.dense[name] = ROUTES
        for group in groups:
            projections = [linear_projection(call.name, call.module, parts=self._parts(call)) for call in group]
            units.append((group[0].order, Linears(projections)))
        for proof in proofs:
            first = proof.up if proof.gate is None or proof.up.order < proof.gate.order else proof.gate
            units.append((first.order, self._network(proof, first)))
        for order, experts in self.seen.experts.values():
            scale = effect_on_block(self.seen.run, experts.observed)
            networks = [replace(network, scale=scale) for network in experts.networks]
            units.append((order, replace(experts, networks=networks)))
        return [unit for _, unit in sorted(units, key=lambda pair: pair[0])]

    def _name_other_weights(self, units: Sequence[Unit]) -> None:
        """Name large parameters that neither a unit nor a layer left dense holds."""
        known = {id(p.parameter) for unit in units for p in unit.projections}
        known |= {id(q) for m, name in self.seen.names.items() if name in self.seen.dense for q in m.parameters()}
        least = LARGE * sum(parameter.numel() for parameter in self.seen.module.parameters())
        for name, parameter in self.seen.module.named_parameters():
            if id(parameter) not in known and parameter.dim() > 1 and parameter.numel() >= least:
                self.seen.dense[f"{self.seen.name}.{name}"] = "it is no linear layer"

    def _reason_dense(self, call: Call, routers: set[str]) -> str | None:
        if call.name in routers:
            return ROUTES
        if self.seen.count[call.name] > 1:
            return f"a forward calls it {self.seen.count[call.name]} times"
        if not call.by_token:
            return f"its input of {tuple(call.given.shape)} has no row for each of {WINDOWS} x {self.seen.positions} tokens"
        return None

    def _routers(self) -> set[str]:
        """Linear layers beside experts that have at most one output an expert: routers, and gates of shared experts.

        Where no experts are proved, but parameters look like experts: those with one output an expert of the configuration.
        """
        found = set()
        if not self.seen.experts:
            numbers = self._numbers_of_experts()
            parameters = self.seen.module.named_parameters()
            if any("expert" in name or (p.dim() == 3 and p.shape[0] in numbers) for name, p in parameters):
                found = {call.name for call in self.seen.calls if call.y.shape[1] in numbers}
        for name, (_, experts) in self.seen.experts.items():
            if name.rpartition(".")[0] != self.seen.name:  # in the block, narrow layers are of many kinds
                found |= {call.name for call in self._beside(name) if call.y.shape[1] <= len(experts.networks)}
        return found

    def _beside(self, experts: str) -> list[Call]:
        """Calls of the layers in the module that holds experts."""
        return [call for call in self.seen.calls if call.name.startswith(f"{experts.rpartition('.')[0]}.")]

    def _deciding(self) -> set[str]:
        """Layers whose output chooses the experts of tokens, and does not reach the experts: a router may have several."""
        found = set()
        for name, (order, experts) in self.seen.experts.items():
            before = self._routing(experts)
            if before is None or before.chosen is None:  # sorted by expert: their input has the weights
                continue
            for call in self._beside(name):
                if call.order > order:
                    continue
                with self.seen.outermost(call.module).register_forward_hook(_for_other_tokens):
                    after = self._routing(experts)
                if after is not None and _same(after.hidden, before.hidden):
                    chooses = not _same(after.chosen, before.chosen) or not _same(after.weights, before.weights)
                    found |= {call.name} if chooses else set()
        return found

    def _routing(self, experts: Experts) -> Routing | None:
        """The routing in a forward of the block."""
        seen: list[Routing | None] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(routing_in(experts, args, kwargs))

        with experts.observed.register_forward_pre_hook(see, with_kwargs=True):
            self.seen.run()
        return seen[0] if seen else None

    def _numbers_of_experts(self) -> set[int]:
        """What the configuration says, in the text decoder or in a part of it."""
        settings = self.seen.model.config.get_text_config(decoder=True).to_dict()
        parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
        return {
            n for part in parts for key, n in part.items() if _EXPERTS.search(str(key)) and type(n) is int and n > 1
        }

    def _network(self, proof: Proof, first: Call) -> Network:
        output = self.seen.outermost(proof.down.module)
        scale = effect_on_block(self.seen.run, output)
        return Network(proof.roles(), proof.activation, first.module, output, scale, up_limit=proof.up_limit)

    def _parts(self, call: Call) -> tuple[int, ...]:
        """Row counts of queries, keys and values in a layer that gives all three, one behind the other.

        The first token attends only to itself, so that attention returns its values.
        """
        heads = self._heads
        later = [other for other in self.seen.calls if other.order > call.order and other.by_token]
        if heads is None or not later or later[0].x.shape[1] % heads:
            return ()
        width = later[0].x.shape[1]
        size = width // heads
        groups, rest = divmod(call.y.shape[1] - width, 2 * size)
        if rest or groups < 1 or heads % groups:
            return ()
        if self.seen.inside[0] != WINDOWS:
            return ()
        first = slice(0, None, self.seen.positions)  # of each window
        values = call.y[first, -groups * size :].view(WINDOWS, groups, 1, size).expand(-1, -1, heads // groups, -1)
        if not close(values.reshape(WINDOWS, width), later[0].x[first]):
            return ()
        return (width, groups * size, groups * size)

    def _replay(self, units: Sequence[Unit]) -> Replay | None:
        """The outermost module whose output is that of its last linear layer, with other layers and no network before it."""
        singles = {unit.projections[0].name: unit.projections[0] for unit in units if isinstance(unit, Linears)}
        lone = {unit.projections[0].name for unit in units if isinstance(unit, Linears) and len(unit.projections) == 1}
        in_networks = {p.module for unit in units if not isinstance(unit, Linears) for p in unit.projections}
        for module, returned in self.seen.returned.items():
            inside = set(module.modules())
            calls = [call for call in self.seen.calls if call.module in inside]
            first = returned[0] if isinstance(returned, tuple) else returned
            if (
                len(calls) > 1
                and calls[-1].name in lone
                and not inside & in_networks
                and isinstance(first, Tensor)
                and first.shape[:2] == self.seen.inside
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
        before = self.seen.run()
        with module.register_forward_hook(lambda *_: (first, *[None] * more)):
            try:
                return torch.equal(self.seen.run(), before)
            except (TypeError, AttributeError):
                return False


def _for_other_tokens(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A forward hook that gives each token the output of the one before."""
    return output.flatten(0, -2).roll(1, 0).view(output.shape) if isinstance(output, Tensor) else output


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
