"""LoRA adapters whose update keeps the zeros of a weight. Importing this module needs the extra ``lora``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from sparsellm_lightning.sparsity.lora import merged, refilled


class MaskedLora(LoraVariant):  # type: ignore[misc]
    """Adds the masked update to a linear layer: ``x (W + M ⊙ s BA)ᵀ`` with M = (W ≠ 0) and s the adapter's scale."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str) -> None: ...

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return merged(orig_weight, _masked(module, active_adapter, orig_weight))

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(merged(orig_weight.data, _masked(module, active_adapter, orig_weight.data)))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return merged(orig_weight, -_masked(module, active_adapter, orig_weight).to(orig_weight.dtype))

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        # Computed again in the backward, because the mask and the update of a whole matrix would be kept for it.
        update: Tensor = checkpoint(_update, module, active_adapter, x, use_reentrant=False)
        return result + update


class MaskedParameter(ParamWrapper):  # type: ignore[misc]
    """The same for a parameter that holds the weights of several experts."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        kept = self.get_param() != 0
        super().merge(*args, **kwargs)
        refilled(self.get_param().data, kept)

    def unmerge(self) -> None:
        kept = self.get_param() != 0
        super().unmerge()
        refilled(self.get_param().data, kept)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        return super().get_delta_weight(adapter_name, *args, **kwargs) * (self.get_param() != 0)

    @contextmanager
    def _activate_lora(self, adapters: list[str]) -> Iterator[None]:
        # peft adds the factors of the product, which no mask can reach.
        base: Any = self.get_base_layer()
        name, parameter = self.parameter_name, self.get_param()
        deltas = [self.get_delta_weight(adapter) for adapter in adapters if adapter in self.lora_A]
        trained = parameter.requires_grad
        parametrize.register_parametrization(base, name, _Plus(deltas))
        base.parametrizations[name].original.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, name, leave_parametrized=False)


class _Plus(nn.Module):
    """Adds tensors to a parameter."""

    def __init__(self, deltas: list[Tensor]) -> None:
        super().__init__()
        self.deltas = deltas

    def forward(self, weight: Tensor) -> Tensor:
        for delta in self.deltas:
            weight = weight + delta
        return weight


def _update(layer: Any, adapter: str, x: Tensor) -> Tensor:
    delta = _masked(layer, adapter, layer.get_base_layer().weight)
    delta = delta.T if layer.fan_in_fan_out else delta
    return torch.nn.functional.linear(layer.lora_dropout[adapter](x), delta.to(x.dtype))


def _masked(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    delta: Tensor = layer.get_delta_weight(adapter)
    return delta * (weight != 0)
