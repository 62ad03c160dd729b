"""Feed-forward networks, proved by the numbers of a forward: what ``down`` sees is ``φ(gate) ⊙ up`` or ``φ(up)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.architecture.layout import Projection, linear_projection
from sparsellm_lightning.solvers import Activation, find_activation

# In ``transformers``, the activations of feed-forward networks. Those that a model's configuration names are tried first.
_ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "quick_gelu",
    "mish",
    "tanh",
    "sigmoid",
    "leaky_relu",
)

Rows = tuple[int, int, int] | None
"""Start, stop and step of a matrix's rows in a fused one. None: all of them."""


@dataclass(frozen=True)
class Call:
    """A linear layer's forward in the probe.

    Args:
        name: of the layer.
        module: the layer.
        order: position among the calls in the block.
        given: input as the layer got it, which is one object for the layers that share it.
        x: input, (tokens, in features).
        y: output, (tokens, out features), with that of a LoRA adapter.
        by_token: whether the layer sees one row for each token, in order.
    """

    name: str
    module: nn.Module
    order: int
    given: Tensor
    x: Tensor
    y: Tensor
    by_token: bool


@dataclass(frozen=True)
class Proof:
    """A feed-forward network that was found.

    Args:
        activation: φ.
        up, down: their calls.
        gate: likewise, or None.
        up_rows, gate_rows: rows of the matrices in a fused layer, whose call is both ``up`` and ``gate``.
        up_limit: ``up`` is clamped to ± this. None: it is not.
    """

    activation: Activation
    up: Call
    down: Call
    gate: Call | None = None
    up_rows: Rows = None
    gate_rows: Rows = None
    up_limit: float | None = None

    @property
    def calls(self) -> set[str]:
        """Names of the layers."""
        return {call.name for call in (self.up, self.down, self.gate) if call is not None}

    def roles(self) -> dict[str, Projection]:
        """Its projections."""
        roles = {} if self.gate is None else {"gate": _projection(self.gate, "gate", self.gate_rows)}
        return roles | {"up": _projection(self.up, "up", self.up_rows), "down": _projection(self.down, "down", None)}


def _projection(call: Call, role: str, rows: Rows) -> Projection:
    whole = linear_projection(call.name, call.module)
    if rows is None:
        return whole
    return replace(whole, name=f"{call.name}.{role}", shape=(len(range(*rows)), whole.shape[1]), rows=rows)


def activations_of(config: PretrainedConfig) -> list[Activation]:
    """Activations to try: those that the configuration names, then the common ones, without those that have parameters."""
    named = [value for value in config.to_dict().values() if isinstance(value, str) and value in ACT2FN]
    found = [find_activation(name) for name in dict.fromkeys([*named, *_ACTIVATIONS])]
    return [a for a in found if not (isinstance(a.function, nn.Module) and any(True for _ in a.function.parameters()))]


def prove(
    down: Call, calls: Sequence[Call], activations: Sequence[Activation], holder: nn.Module | None
) -> Proof | None:
    """The feed-forward network that ends in ``down``, or None.

    Args:
        down: the candidate.
        calls: candidates for gate and up. Those behind ``down`` are ignored.
        activations: to try, in this order.
        holder: the module that calls the layers. If it has a ``limit``, gate and up are clamped by it (DeepSeek-V4).
    """
    if not down.by_token or not down.x.any():
        return None
    width = down.x.shape[1]
    before = [call for call in calls if call.order < down.order and call.by_token]
    single, double = ([call for call in before if call.y.shape[1] == factor * width] for factor in (1, 2))
    few = slice(0, 2)  # tokens that rule out most candidates
    limit = None if holder is None else stated_number(holder, "limit", "swiglu_limit")
    for activation, bound in with_limit(activations, limit):
        for gate in single:
            gated = activation(gate.y.float())
            if bound is None and _equal(gated[few], down.x[few]) and _equal(gated, down.x):
                return Proof(activation, gate, down)  # not gated: the one before is up
            for up in single:
                if up is gate or not same(up, gate):
                    continue
                value = clamp(up.y.float(), bound)
                if _equal(gated[few] * value[few], down.x[few]) and _equal(gated * value, down.x):
                    return Proof(activation, up, down, gate, up_limit=bound)
        for call in double:
            for gate_rows, up_rows in fused_rows(width):
                gate_y, up_y = call.y[:, slice(*gate_rows)].float(), call.y[:, slice(*up_rows)].float()
                if _equal(activation(gate_y) * clamp(up_y, bound), down.x):
                    return Proof(activation, call, down, call, up_rows, gate_rows, bound)
    return None


def clamp(up: Tensor, limit: float | None) -> Tensor:
    """``up`` in ± limit. None: as it is."""
    return up if limit is None else up.clamp(-limit, limit)


def with_limit(activations: Sequence[Activation], limit: float | None) -> list[tuple[Activation, float | None]]:
    """Activations to try, each with the limit of ``up``. Clamped ones first: the probe's tokens may be too small to show it."""
    plain: list[tuple[Activation, float | None]] = [(activation, None) for activation in activations]
    if limit is None or not math.isfinite(limit):
        return plain
    return [(clamped(activation, limit), limit) for activation in activations] + plain


def stated_number(module: nn.Module, *names: str) -> float | None:
    """The first of a module's attributes that is a number."""
    found = (getattr(module, name, None) for name in names)
    return next((float(value) for value in found if isinstance(value, (int, float))), None)


@cache
def clamped(activation: Activation, limit: float) -> Activation:
    """``φ(min(t, limit))``. Equal ones are one object, for which steps are compiled once."""

    def derivatives(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, first, second = activation.expand(t.clamp(max=limit))
        return value, first * (t < limit), second * (t < limit)

    name = f"{activation.name}, clamped at {limit:g}"
    return Activation(name, lambda t: activation(t.clamp(max=limit)), derivatives if activation.derivatives else None)


def fused_rows(width: int) -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Rows of gate and of up in a matrix of ``2 · width`` rows: halves and interleaved, in either order."""
    for one, other in (
        ((0, width, 1), (width, 2 * width, 1)),
        ((0, 2 * width, 2), (1, 2 * width, 2)),
    ):
        yield one, other
        yield other, one


def same(a: Call, b: Call) -> bool:
    """Whether two layers see one input."""
    if a.x.shape != b.x.shape:
        return False
    # Equal numbers are one input too: a copy. Where they are not finite, only the same memory is.
    return a.given.data_ptr() == b.given.data_ptr() or torch.equal(a.x, b.x)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether a equals b but for rounding in the dtype of b. False if b is 0."""
    return _equal(a, b) and bool(b.any())


def is_product(layer: Any, x: Tensor, y: Tensor) -> bool:
    """Whether a linear layer has given ``y = x Wᵀ + b``, of its own weight and bias.

    Classes made from ``nn.Linear`` may scale, normalise or round what they see. True if that is not known: y is not finite, or
    the weight is sharded again.
    """
    if isinstance(layer.weight, DTensor) or not math.isfinite(float(y.detach().float().norm())):
        return True
    weight = layer.weight if isinstance(layer, Conv1D) else layer.weight.T
    if (*x.shape[:-1], *weight.shape) != (*y.shape[:-1], x.shape[-1], y.shape[-1]):
        return False
    product = (x.to(y.dtype) @ weight.to(y.dtype)).float()
    return _equal(product if layer.bias is None else product + layer.bias, y)


def _equal(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if b.dtype in (torch.float32, torch.float64) else 2e-2
    size = float(b.float().norm())
    return math.isfinite(size) and float((a.float() - b.float()).norm()) <= tolerance * size


Run = Callable[[], Tensor]


def effect_on_block(run: Run, output: nn.Module) -> float | None:
    """The factor with which a change of a module's output changes the block's output. None if there is no such factor.

    ::

        B(y + δ) − B(y) = c δ

    Args:
        run: returns the block's output, (batch, sequence, d).
        output: the module whose output is y.
    """
    before = run()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(before.shape, generator=generator).to(before.device) * before.float().square().mean().sqrt()

    def disturb(_: nn.Module, args: object, returned: Any) -> Any:
        first = returned[0] if isinstance(returned, tuple) else returned
        first = first + noise.view(first.shape).to(first.dtype)
        return (first, *returned[1:]) if isinstance(returned, tuple) else first

    hook = output.register_forward_hook(disturb)
    try:
        after = run()
    except RuntimeError:  # of another shape
        return None
    finally:
        hook.remove()
    change = after.float() - before.float()
    factor = float((change * noise).sum() / noise.square().sum())
    # Of what the block computes in, which FSDP may choose other than that of the weights.
    tolerance = 1e-3 if before.dtype in (torch.float32, torch.float64) else 5e-2
    if not float((change - factor * noise).norm()) <= tolerance * max(abs(factor), 1e-3) * float(noise.norm()):
        return None
    if abs(factor) < tolerance:
        return None
    return 1.0 if abs(factor - 1) < tolerance else factor
