"""Mixtures of experts that are lists of modules: which tokens go to which expert, by derivatives, and the experts' layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.architecture.blocks import hidden_states, patched_forward
from sparsellm_lightning.architecture.experts import Routing, routing_of
from sparsellm_lightning.architecture.feed_forward import Call, close, prove
from sparsellm_lightning.architecture.layout import Experts, Network, linear_projection
from sparsellm_lightning.solvers import Activation


def listed_experts(mixture: nn.Module) -> dict[str, list[nn.Module]]:
    """A module's lists of experts, by name: two or more modules of one class, with equal linear layers, two or more each."""
    found: dict[str, list[nn.Module]] = {}
    for name, child in mixture.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            modules = list(child.values() if isinstance(child, nn.ModuleDict) else child)
            shapes = [
                [
                    (path, linear_projection(path, m).shape)
                    for path, m in expert.named_modules()
                    if isinstance(m, (nn.Linear, Conv1D))
                ]
                for expert in modules
            ]
            if len(modules) > 1 and len(shapes[0]) > 1 and all(shape == shapes[0] for shape in shapes):
                found[name] = modules
    return found


def routing_in(experts: Experts, args: Sequence[Any], kwargs: dict[str, Any]) -> Routing | None:
    """The routing in a call of a mixture. None if the arguments are not those of the probe.

    Args:
        experts: that the probe found.
        args, kwargs: of the call of ``experts.observed``.
    """
    if experts.listed:
        return listed_routing(experts.observed, [network.output for network in experts.networks], args, kwargs)
    return routing_of(experts.observed, args, kwargs)


def listed_routing(
    mixture: nn.Module, experts: Sequence[nn.Module], args: Sequence[Any], kwargs: dict[str, Any]
) -> Routing | None:
    """The routing in a call of a mixture: experts, input and weights of each token. None if the experts' inputs are others.

    The experts do not run. Each gives zeros ``z`` in place of its outputs, and the mixture's output y is differentiated::

        ∂(Σ_t b_t Σ_j y_tj) / ∂z_ij = w_i b_t(i)

    where row i of an expert's input is token t(i), with weight w_i. With ``b = 1`` that is the weight. With b_t the binary
    digits of t, one at a time, it tells t.

    Args:
        mixture: the module that calls the experts.
        experts: as :func:`listed_experts` gives them.
        args, kwargs: of the mixture's call.
    """
    hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if hidden is None:
        return None
    hidden = hidden.detach().flatten(0, -2)
    rows: list[tuple[int, Tensor, Tensor]] = []
    with torch.enable_grad(), _giving_zeros(experts, rows):
        output = hidden_states(mixture.forward(*args, **kwargs))
        if not rows or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        flat = output.flatten(0, -2)
        if len(flat) != len(hidden):
            return None
        zeros = [z for _, _, z in rows]

        def differentiate(b: Tensor) -> Tensor | None:
            directions = b[:, None].to(flat).expand_as(flat)
            parts = torch.autograd.grad(flat, zeros, directions, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(z) if part is None else part for part, z in zip(parts, zeros, strict=True)]
            joined = torch.cat([part.flatten(0, -2) for part in filled]).float()
            return joined[:, 0] if close(joined, joined[:, :1].expand_as(joined)) or not joined.any() else None

        tokens = torch.arange(len(hidden), device=hidden.device)
        weight = differentiate(torch.ones_like(tokens))
        if weight is None:
            return None
        token = torch.zeros_like(weight, dtype=torch.long)
        for digit in range(max(len(hidden) - 1, 1).bit_length()):
            marked = differentiate(tokens >> digit & 1)
            if marked is None:
                return None
            token += (marked.abs() > weight.abs() / 2).long() << digit
    used = weight != 0
    given = torch.cat([x.flatten(0, -2) for _, x, _ in rows])
    if not torch.equal(given[used], hidden[token[used]].to(given)):
        return None
    expert = torch.cat([torch.full_like(z.flatten(0, -2)[:, 0], index, dtype=torch.long) for index, _, z in rows])
    weights = torch.zeros(len(hidden), len(experts), dtype=weight.dtype, device=hidden.device)
    weights.index_put_((token[used], expert[used]), weight[used], accumulate=True)
    most = max(int((weights != 0).sum(1).max()), 1)
    chosen = weights.abs().topk(most).indices
    return Routing(hidden, chosen, weights.gather(1, chosen))


def prove_listed(
    names: dict[nn.Module, str],
    mixture: nn.Module,
    experts: Sequence[nn.Module],
    call: tuple[Sequence[Any], dict[str, Any], Tensor],
    activations: Sequence[Activation],
) -> Experts | None:
    """The experts of a mixture, if each is a feed-forward network and the mixture adds up their weighted outputs.

    None too if every token goes to all of them with the same weights: shared experts are networks as any other.

    Args:
        names: of all modules.
        mixture: the module that calls the experts.
        experts: as :func:`listed_experts` gives them.
        call: positional and named arguments of a call of the mixture, and its output.
        activations: to try, in this order.
    """
    args, kwargs, output = call
    routing = listed_routing(mixture, experts, args, kwargs)
    if routing is None:
        return None
    weights = torch.stack([routing.of(index)[1] for index in range(len(experts))])
    if close(weights, weights[:, :1].expand_as(weights)):
        return None
    networks, total = [], torch.zeros_like(routing.hidden, dtype=torch.float32)
    for expert, weight in zip(experts, weights, strict=True):
        found = _network(names, expert, routing.hidden, activations)
        if found is None:
            return None
        network, y = found
        networks.append(network)
        total += y.float() * weight.float()[:, None]
    with _giving_zeros(experts, []):
        others = hidden_states(mixture.forward(*args, **kwargs)).flatten(0, -2)
    if not close(total + others.float(), output.flatten(0, -2)):
        return None
    assert routing.chosen is not None
    return Experts(networks, mixture, routing.chosen.shape[1] / len(experts), listed=True)


@contextmanager
def _giving_zeros(experts: Sequence[nn.Module], rows: list[tuple[int, Tensor, Tensor]]) -> Iterator[None]:
    """The experts give zeros of the shape of their input. Each call is noted: (expert, input, output)."""

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            rows.append((index, x.detach(), torch.zeros_like(x, requires_grad=torch.is_grad_enabled())))
            return rows[-1][2]

        return forward

    with ExitStack() as stack:
        for index, expert in enumerate(experts):
            stack.enter_context(patched_forward(expert, stand_in(index)))
        yield


def _network(
    names: dict[nn.Module, str], expert: nn.Module, x: Tensor, activations: Sequence[Activation]
) -> tuple[Network, Tensor] | None:
    """An expert's feed-forward network, proved for tokens x, (n, d), and its output for them. None if it is another."""
    calls: list[Call] = []

    def see(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        calls.append(Call(names[module], module, len(calls), args[0], args[0].clone(), y.clone(), True))

    with ExitStack() as hooks:
        for module in expert.modules():
            if isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in names[module]:
                hooks.callback(module.register_forward_hook(see).remove)
        output = expert(x)
    proof = prove(calls[-1], calls, activations, expert) if calls else None
    if proof is None or not torch.equal(proof.up.x, x) or not torch.equal(output, calls[-1].y):
        return None
    return Network(proof.roles(), proof.activation, proof.up.module, expert, None, up_limit=proof.up_limit), output
