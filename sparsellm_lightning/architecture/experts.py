"""Mixtures of experts whose weights are parameters of three dimensions: their layout, proved by the numbers of a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architecture.feed_forward import (
    Rows,
    clamp,
    clamped,
    close,
    fused_rows,
    stated_number,
    with_limit,
)
from sparsellm_lightning.architecture.layout import Experts, Network, Projection
from sparsellm_lightning.solvers import Activation


@dataclass(frozen=True)
class Routing:
    """What an experts module is called with.

    Args:
        hidden: (tokens, d); of a module that gets its tokens sorted by expert, (experts, tokens, d), which may be sparse.
        chosen: (tokens, k) indices of the experts of each token. None: sorted by expert.
        weights: (tokens, k) weights of their outputs. None: sorted by expert.
    """

    hidden: Tensor
    chosen: Tensor | None = None
    weights: Tensor | None = None

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The input of an expert for every token, (tokens, d), and the weight of its output, (tokens,). 0: not routed there."""
        if self.chosen is None:
            x = self.hidden[expert]
            x = x.to_dense() if x.is_sparse else x
            return x, x.any(-1).to(x.dtype)
        assert self.weights is not None
        return self.hidden, (self.weights * (self.chosen == expert)).sum(-1)


def holds_experts(module: nn.Module) -> bool:
    """Whether a module's own parameters include two of three dimensions."""
    return sum(p.dim() == 3 for p in module.parameters(recurse=False)) >= 2


def routing_of(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Routing | None:
    """The routing in a call of an experts module. None if the arguments are others."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        return None
    hidden = tensors[0].detach().flatten(0, -2)
    if len(tensors) == 1:
        experts = next(len(p) for p in module.parameters(recurse=False) if p.dim() == 3)
        return Routing(hidden.view(experts, -1, hidden.shape[-1])) if len(hidden) % experts == 0 else None
    chosen = [t.flatten(0, -2) for t in tensors[1:] if not t.is_floating_point()]
    weights = [t.detach().flatten(0, -2) for t in tensors[1:] if t.is_floating_point()]
    if len(chosen) != 1 or len(weights) != 1 or chosen[0].shape != weights[0].shape or len(chosen[0]) != len(hidden):
        return None
    return Routing(hidden, chosen[0], weights[0])


def prove_experts(
    name: str, module: nn.Module, routing: Routing, output: Tensor, activations: Sequence[Activation]
) -> Experts | None:
    """The experts of a module, if feed-forward networks with its parameters give its output. To be called in its forward.

    Args:
        name: of the module.
        module: with parameters of three dimensions.
        routing: that it was called with.
        output: what it returned.
        activations: to try, in this order.
    """
    alpha, limit = (stated_number(module, name, f"swiglu_{name}") for name in ("alpha", "limit"))
    tried = [(activation, 0.0, bound) for activation, bound in with_limit(activations, limit)]
    if limit is not None and alpha is not None:  # GPT-OSS, MiniMax-M3
        tried.insert(0, (clamped(_swish(alpha), limit), 1.0, limit))
    for first in _layouts(name, module, routing.hidden.shape[-1]):
        for activation, offset, bound in tried:
            more = (offset, bound) if "gate" in first[0] else ()
            networks = [Network(roles, activation, module, module, None, *more) for roles in first]
            if close(_output(networks, routing).flatten(), output.detach().flatten()):
                count = len(networks)
                share = 1.0 / count if routing.chosen is None else routing.chosen.shape[-1] / count
                return Experts(networks, module, share)
    return None


def _evaluate(network: Network, x: Tensor) -> Tensor:
    """The output of a network for tokens x, (n, d), from its parameters as they are."""

    def linear(role: str, x: Tensor) -> Tensor:
        p = network.roles[role]
        bias = None if p.bias is None else p.bias_of(p.bias.detach())
        return torch.nn.functional.linear(x, p.matrix, bias)

    up = linear("up", x)
    up = clamp(up, network.up_limit) + network.up_offset
    hidden = network.activation(linear("gate", x)) * up if "gate" in network.roles else network.activation(up)
    return linear("down", hidden)


def _output(networks: Sequence[Network], routing: Routing) -> Tensor:
    outputs = []
    for expert, network in enumerate(networks):
        x, weight = routing.of(expert)
        y = _evaluate(network, x.to(network.roles["up"].parameter.dtype))
        outputs.append(y if routing.chosen is None else y * weight[:, None])
    return torch.cat(outputs) if routing.chosen is None else torch.stack(outputs).sum(0)


def _layouts(name: str, module: nn.Module, dim: int) -> Iterator[list[dict[str, Projection]]]:
    """The projections of all experts by role, in every layout that the shapes of a module's parameters allow."""
    parameters = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
    for down, stored in parameters.items():
        for transposed in (False, True):
            outputs, width = _shape(stored, transposed)
            if outputs != dim:
                continue
            firsts = {key: p for key, p in parameters.items() if key != down and _shape(p, transposed)[1] == dim}
            rows = {key: _shape(p, transposed)[0] for key, p in firsts.items()}
            for key, size in rows.items():
                if size == 2 * width:
                    for gate_rows, up_rows in fused_rows(width):
                        roles = {"gate": (key, gate_rows), "up": (key, up_rows), "down": (down, None)}
                        yield _networks(name, module, roles, transposed, len(stored))
            plain = [key for key, size in rows.items() if size == width]
            for gate in plain:
                for up in plain:
                    pair: dict[str, tuple[str, Rows]] = {} if gate == up else {"gate": (gate, None)}
                    pair |= {"up": (up, None), "down": (down, None)}
                    yield _networks(name, module, pair, transposed, len(stored))


def _networks(
    name: str,
    module: nn.Module,
    roles: Mapping[str, tuple[str, Rows]],
    transposed: bool,
    experts: int,
) -> list[dict[str, Projection]]:
    def projection(role: str, expert: int) -> Projection:
        key, rows = roles[role]
        outputs, inputs = _shape(getattr(module, key), transposed)
        outputs = outputs if rows is None else len(range(*rows))
        return Projection(
            f"{name}.{expert}.{role}", module, True, (outputs, inputs), key, transposed, expert=expert, rows=rows
        )

    return [{role: projection(role, expert) for role in roles} for expert in range(experts)]


def _shape(stored: Tensor, transposed: bool) -> tuple[int, int]:
    return (stored.shape[2], stored.shape[1]) if transposed else (stored.shape[1], stored.shape[2])


@cache  # equal activations are one object, for which steps are compiled once
def _swish(alpha: float) -> Activation:
    return Activation(f"swish of {alpha:g} t", lambda t: t * torch.sigmoid(alpha * t))
