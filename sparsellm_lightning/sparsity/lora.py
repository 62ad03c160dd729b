"""LoRA adapters on sparse layers. Their product is masked by the layer's zeros, in training as in the merge."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.distributed import StrategyAdapter, local_tensor
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.sparsity.masks import MANY_ZEROS, linear_layers, sparse_layers, zero_shares

# Name parts of modules that are left out of states.
_WRAPPED = re.compile(r"_(fsdp|checkpoint)_wrapped_module\.")


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (Hu et al., arXiv 2106.09685) for :class:`~sparsellm_lightning.CausalLM`. Needs the extra ``lora``.

    Args:
        rank: r of ``A`` (r, in) and ``B`` (out, r).
        alpha: the update is ``alpha / rank · BA``.
        dropout: on the adapter's input.
        target_modules: names or name endings of the layers that get an adapter. ``all-linear``: all but the head.

    Raises:
        UserError: rank below 1, or dropout outside [0, 1).
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"lora needs a rank of at least 1 and a dropout in [0, 1), got {self.rank} and {self.dropout}. "
                "Rank 16 is usual."
            )


def add_adapters(model: nn.Module, options: LoraOptions) -> None:
    """Put fresh adapters into a model, in place, and freeze everything else.

    Raises:
        UserError: ``peft`` is not installed, no layer matches, or one is an embedding.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "lora needs the package peft, which is not installed. Run: pip install 'sparsellm-lightning[lora]'"
        ) from error
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        exclude_modules=_of_other_kinds(model) if options.target_modules == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(
            f"lora.target_modules must name layers of the model, got {options.target_modules}: {error}"
        ) from error
    check_mergeable(model)


def _of_other_kinds(model: nn.Module) -> list[str] | None:
    """Linear layers whose forward returns more than a product, such as some routers."""
    names = []
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear) and type(child) is not nn.Linear:
            with torch.no_grad():
                output = child(torch.zeros(2, child.in_features, device=child.weight.device, dtype=child.weight.dtype))
            if not isinstance(output, Tensor):
                names.append(name)
    return names or None


def check_mergeable(model: nn.Module) -> None:
    """Refuse what :func:`merged_state` cannot merge.

    Raises:
        UserError: an adapter on an embedding or on a head tied to it, because a merge into one would change the other; an
            adapter that is not plain LoRA.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if base is not None and id(getattr(base, "weight", None)) in embeddings:
            raise UserError(
                f"LoRA adapters must be on linear layers of their own weight, got one on {name}, which is an embedding or tied "
                "to one. Leave it out of target_modules."
            )
        kind = _other_kind(module)
        if kind is not None:
            raise UserError(
                f"An export merges plain LoRA adapters, but {name} has {kind}. Leave that out, or leave out export_dir and "
                "merge the adapters with peft."
            )


def _other_kind(module: nn.Module) -> str | None:
    """What ``peft`` has put on a module that is not plain LoRA. None: nothing."""
    if hasattr(module, "original_module"):
        return "a copy that is trained (modules_to_save or the like)"
    if not (hasattr(module, "base_layer") and hasattr(module, "active_adapters")):
        return None
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper

    from sparsellm_lightning.sparsity.masked_lora import MaskedLora

    if not isinstance(module, (Linear, ParamWrapper)):
        return f"an adapter of another kind, {type(module).__name__}"
    for variant in getattr(module, "lora_variant", {}).values():
        if not isinstance(variant, MaskedLora):
            return type(variant).__name__
    return "lora_bias" if any(getattr(module, "lora_bias", {}).values()) else None


def has_adapters(module: nn.Module) -> bool:
    """Whether any layer carries a ``peft`` adapter."""
    return any(hasattr(child, "base_layer") and hasattr(child, "active_adapters") for child in module.modules())


def adapter_at_work(model: nn.Module) -> str | None:
    """Name of a layer whose LoRA adapter is not merged and changes what the layer gives (on this rank's shard). None: none."""
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "lora_B") or layer.disable_adapters:
            continue
        at_work = [a for a in layer.active_adapters if a in layer.lora_B and a not in layer.merged_adapters]
        if any(bool(local_tensor(layer.lora_B[adapter].weight).any()) for adapter in at_work):
            return str(name)
    return None


def mask_adapters(module: nn.Module, sparse: Collection[nn.Module]) -> None:
    """Have LoRA adapters on sparse layers compute ``x (W + M ⊙ s BA)ᵀ``, with M = (W ≠ 0) and s the adapter's scale.

    Likewise each expert's W and BA, of adapters on experts that share one parameter.

    The merged weight ``W + M ⊙ s BA`` has the zeros of W, and the merged model has the logits of the trained one. M is read
    from W in every forward.

    Args:
        module: anything that may hold ``peft`` layers.
        sparse: layers whose zeros are kept.

    Raises:
        UserError: see :func:`maskable_adapters`.
    """
    found = maskable_adapters(module, sparse)
    if not found:
        return
    from peft.tuners.lora.layer import ParamWrapper

    from sparsellm_lightning.sparsity.masked_lora import MaskedLora, MaskedParameter

    for layer in found:
        if isinstance(layer, ParamWrapper):
            layer.__class__ = MaskedParameter
            continue
        for adapter in layer.lora_A:
            layer.lora_variant[adapter] = MaskedLora()


def mask_adapters_by_zeros(module: nn.Module, adapter: StrategyAdapter) -> None:
    """Mask the adapters on the layers that are sparse, as in training. For evaluations of adapters from a checkpoint.

    All ranks call this together.
    """
    layers = linear_layers(module)
    sparse = sparse_layers(layers, zero_shares(layers, adapter), adapter)
    mask_adapters(module, {p.module for p in sparse})


def maskable_adapters(module: nn.Module, sparse: Collection[nn.Module]) -> list[Any]:
    """The ``peft`` layers of LoRA adapters on sparse layers. For arguments see :func:`mask_adapters`.

    Raises:
        UserError: an adapter of another kind, whose merge would fill the zeros.
    """
    if not has_adapters(module):
        return []
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    from sparsellm_lightning.sparsity.masked_lora import MaskedLora

    found: list[Any] = []
    for layer in module.modules():
        if not isinstance(layer, BaseTunerLayer) or layer.get_base_layer() not in sparse:
            continue
        foreign = [v for v in getattr(layer, "lora_variant", {}).values() if not isinstance(v, MaskedLora)]
        if isinstance(layer, IA3Layer):
            continue  # scales rows or columns: zeros stay zero
        if not isinstance(layer, (Linear, ParamWrapper)) or foreign:
            kind = type(foreign[0] if foreign else layer).__name__
            raise UserError(
                f"Adapters on a sparse layer must be plain LoRA or IA3, whose merge can keep the zeros, got {kind}. "
                "Use peft.LoraConfig without use_dora and the like."
            )
        if isinstance(layer, Linear) and any(layer.lora_bias.values()):
            raise UserError(
                "Adapters on a sparse layer must have no biases of their own, but lora_bias is true. Set it to false."
            )
        found.append(layer)
    return found


def merged_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with its LoRA adapters merged (masked by the zeros of sparse layers) and removed.

    Args:
        model: with adapters. Read for their names, their scales and whether they are merged already.
        state: its whole state dict.

    Returns:
        the state of the plain model. Tensors without an adapter are shared with ``state``.

    Raises:
        UserError: see :func:`check_mergeable`.
    """
    check_mergeable(model)
    plain = dict(state)
    # Adapters on two parameters of one module lie inside each other: the inner one first.
    for name, module in reversed(list(model.named_modules())):
        if not hasattr(module, "lora_A") or not hasattr(module, "base_layer"):
            continue
        layer: Any = module
        prefix = _WRAPPED.sub("", f"{name}.") if name else ""
        base = {key: plain.pop(key) for key in list(plain) if key.startswith(f"{prefix}base_layer.")}
        own = {key: plain.pop(key) for key in list(plain) if key.startswith(f"{prefix}lora_")}
        key = f"{prefix}base_layer.{getattr(layer, 'parameter_name', 'weight')}"
        weight = base[key]
        kept = weight != 0
        # As in training. Adapters that were loaded again have no mask yet.
        masked = _is_masked(layer) or 0 < float(kept.float().mean()) <= 1 - MANY_ZEROS
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            if adapter in layer.lora_A and adapter not in layer.merged_adapters:
                a, b = (own[f"{prefix}lora_{part}.{adapter}.weight"].float() for part in "AB")
                delta = _product(layer, a, b) * layer.scaling[adapter]
                base[key] = weight = merged(weight, delta * kept) if masked else (weight + delta).to(weight.dtype)
        plain |= {prefix + key.removeprefix(f"{prefix}base_layer."): value for key, value in base.items()}
    return plain


def filled_by_merge(model: nn.Module) -> set[int]:
    """The ``id`` of each weight with active adapters that are not masked. Merging these adapters fills the weight's zeros."""
    filled = set()
    for module in model.modules():
        layer: Any = module
        if not hasattr(layer, "lora_B") or not hasattr(layer, "base_layer") or _is_masked(layer):
            continue
        if not layer.disable_adapters and any(adapter in layer.lora_B for adapter in layer.active_adapters):
            filled.add(id(getattr(layer.base_layer, getattr(layer, "parameter_name", "weight"))))
    return filled


def _is_masked(layer: Any) -> bool:
    """Whether :func:`mask_adapters` has masked the adapters of a layer."""
    from sparsellm_lightning.sparsity.masked_lora import MaskedLora, MaskedParameter

    variants = getattr(layer, "lora_variant", {}).values()
    return isinstance(layer, MaskedParameter) or any(isinstance(variant, MaskedLora) for variant in variants)


def merged(weight: Tensor, masked: Tensor) -> Tensor:
    """``W + M ⊙ δ`` in the dtype of W, with M = (W ≠ 0). A kept weight that would round to zero becomes the smallest number."""
    return refilled((weight + masked).to(weight.dtype), weight != 0)


def refilled(weight: Tensor, kept: Tensor) -> Tensor:
    """The weight itself, in which kept entries that have become zero are the smallest number."""
    return weight.masked_fill_((weight == 0) & kept, torch.finfo(weight.dtype).tiny)


def _product(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """``BA`` of an adapter, in the shape of its weight. Experts: (experts, out, in) or (experts, in, out)."""
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return (b @ a).T if layer.fan_in_fan_out else b @ a
    first, second = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts)
    order = "e o i" if layer._did_swap_in_out_features else "e i o"
    return torch.einsum(f"o r e, e r i -> {order}", second, first)
