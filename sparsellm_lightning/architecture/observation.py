"""What runs inside one decoder block: a forward of it with hooks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.architecture.blocks import hidden_states, refusing
from sparsellm_lightning.architecture.experts import holds_experts, prove_experts, routing_of
from sparsellm_lightning.architecture.feed_forward import Call, is_product
from sparsellm_lightning.architecture.layout import Experts
from sparsellm_lightning.architecture.listed import listed_experts, prove_listed
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import Activation

NO_TENSOR = "it takes or returns no single tensor"
_NO_ROWS = "it has no row for each token"
WINDOWS, TOKENS = 2, 11  # of the probe. Two windows, so that (batch, sequence) is told from (sequence, batch)


@dataclass
class BlockCall:
    """One call of a block. Hidden states are copies, because a block may work in place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        """A call that begins."""
        if args:
            return cls((copied(args[0]), *args[1:]), dict(kwargs))
        return cls(args, {k: copied(value) if k == "hidden_states" else value for k, value in kwargs.items()})

    def end(self, returned: Any) -> None:
        """Note what the block returned."""
        pair = type(returned) in (tuple, list) and returned
        self.returned = type(returned)([copied(returned[0]), *returned[1:]]) if pair else copied(returned)

    def again(self, module: nn.Module) -> Any:
        """Call a block with the same arguments."""
        call = BlockCall.of(self.args, self.kwargs)
        return module(*call.args, **call.kwargs)


def copied(value: Any) -> Any:
    """A copy of a tensor. Anything else is returned as it is."""
    return value.clone() if isinstance(value, Tensor) else value


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
class Observation:
    """What one forward of a block shows: calls of its linear layers, its experts, and what the modules inside return.

    Args:
        model: that holds the block.
        module: the block.
        names: of all modules.
        call: the block's arguments in a forward of the model, and what it returned.
        activations: to try in experts.

    Attributes:
        calls: the first call of each linear layer, in the order of calls. Layers inside ``experts`` are left out.
        count: how often a forward calls each linear layer, by name.
        experts: those that are proved, by name, with the position of their call among all calls.
        dense: why a module stays dense, by name.
        returned: what each module with children returned. None if it was called twice.
    """

    model: PreTrainedModel
    module: nn.Module
    names: dict[nn.Module, str]
    call: BlockCall
    activations: list[Activation]
    calls: list[Call] = field(default_factory=list)
    count: dict[str, int] = field(default_factory=dict)
    experts: dict[str, tuple[int, Experts]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    returned: dict[nn.Module, Any] = field(default_factory=dict)
    _calls_of_experts: Counter[str] = field(default_factory=Counter)
    _proving: bool = False
    _clock: Iterator[int] = field(default_factory=itertools.count)

    @property
    def name(self) -> str:
        """The block's."""
        return self.names[self.module]

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

    def run(self) -> Tensor:
        """The block's hidden states."""
        return hidden_states(self.call.again(self.module))

    def observe(self) -> None:
        """Run the block with hooks.

        Raises:
            UserError: it does not run on its own, returns no hidden states, or others than in the model.
        """
        name = f"{self.name} of {type(self.model).__name__}"
        with (
            refusing(
                f"A decoder block must run on its own, but {name} fails when it is called again",
                ". Such blocks are not supported.",
            ),
            self._observed(),
        ):
            again = self.run()
        if type(self.call.returned) not in (tuple, list) and not isinstance(self.call.returned, Tensor):
            raise UserError(
                f"A decoder block must return its hidden states, alone or first in a tuple, but {self.name} of "
                f"{type(self.model).__name__} returns a {type(self.call.returned).__name__}. Such blocks are not supported."
            )
        first = hidden_states(self.call.returned)
        if not isinstance(first, Tensor) or not torch.allclose(first, again, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UserError(
                f"A decoder block must give the same output when it is called again, but {self.name} of "
                f"{type(self.model).__name__} does not. Blocks with a state of their own are not supported."
            )

    @contextmanager
    def _observed(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for child in self.module.modules():
                if isinstance(child, (nn.Linear, Conv1D)) and self.names[child].count("lora_") == 0:
                    self.count.setdefault(self.names[child], 0)
                    hooks.callback(child.register_forward_hook(self._check_linear).remove)
                    outer = self.outermost(child)
                    hooks.callback(outer.register_forward_hook(self._see_linear(child)).remove)
                elif holds_experts(child):
                    self.dense[self.names[child]] = "its parameters of three dimensions are not experts of a known form"
                    hooks.callback(child.register_forward_hook(self._see_experts, with_kwargs=True).remove)
                elif any(True for _ in child.children()) and child is not self.module:
                    hooks.callback(child.register_forward_hook(self._see_module).remove)
                    if listed_experts(child):
                        hooks.callback(child.register_forward_hook(self._see_mixture, with_kwargs=True).remove)
            yield

    def outermost(self, child: nn.Module) -> nn.Module:
        """The module around a linear layer that has its name: a LoRA adapter, or itself."""
        return next(module for module, name in self.names.items() if name == self.names[child])

    def _check_linear(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            self.dense[self.names[module]] = NO_TENSOR
        elif parametrize.is_parametrized(module) or _computes_its_weight(module) or not is_product(module, x, y):
            self.dense[self.names[module]] = "it computes more than a product with its weight"

    def _see_linear(self, child: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        name = self.names[child]

        def see(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if self._proving:
                return
            self.count[name] += 1
            x = args[0] if args else None
            if self.count[name] > 1 or name in self.dense or not isinstance(x, Tensor) or not isinstance(y, Tensor):
                return
            if x.dim() < 2:
                self.dense[name] = _NO_ROWS
                return
            leading = tuple(size for size in x.shape[:-1] if size > 1)
            by_token = leading in (self.inside, (WINDOWS * self.positions,))
            # Copies, because an activation may work in place.
            self.calls.append(
                Call(
                    name,
                    child,
                    next(self._clock),
                    x.detach(),
                    x.detach().flatten(0, -2).clone(),
                    y.detach().flatten(0, -2).clone(),
                    by_token,
                )
            )

        return see

    def _see_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._proving:
            return
        name = self.names[module]
        self._calls_of_experts[name] += 1
        if self._calls_of_experts[name] > 1:  # on parts of the tokens
            if self.experts.pop(name, None) is not None:
                self.dense[name] = "a forward calls it more than once"
            return
        routing = routing_of(module, args, kwargs)
        if routing is not None and isinstance(output, Tensor):
            if routing.hidden.shape[-2] != WINDOWS * self.positions:
                self.dense[name] = _NO_ROWS
                return
            found = prove_experts(name, module, routing, output, self.activations)
            if found is not None:
                self.experts[name] = (next(self._clock), found)
                del self.dense[name]

    def _see_mixture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Prove experts that are modules, and forget the calls of their layers. Sharded weights are whole in the forward."""
        if self._proving:
            return
        for name, modules in listed_experts(module).items():
            if any(self.names.get(inside) in self.dense for expert in modules for inside in expert.modules()):
                continue  # they are more than their weights
            self._proving = True
            try:
                found = prove_listed(
                    self.names, module, modules, (args, kwargs, hidden_states(output)), self.activations
                )
            except torch.OutOfMemoryError:
                raise
            except Exception:  # modules of another kind, which cannot be called so
                found = None
            finally:
                self._proving = False
            if found is not None:
                self.experts[f"{self.names[module]}.{name}"] = (next(self._clock), found)
                inside = {m for expert in modules for m in expert.modules()}
                self.calls = [call for call in self.calls if call.module not in inside]
                for p in found.projections:
                    self.count.pop(self.names[p.module], None)

    def _see_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Of a module that is called twice, the second call is not known to be like the first.
        if self._proving:
            return
        self.returned[module] = None if module in self.returned else output


def _computes_its_weight(module: nn.Module) -> bool:
    """Whether a hook makes the weight from other parameters before each forward, as torch's older prune and weight_norm do."""
    return "weight" not in module._parameters and any(name.startswith("weight_") for name in module._parameters)
