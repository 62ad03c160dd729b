"""Keeping zeros in training that no Lightning Trainer runs: a plain loop, Hugging Face's Trainer, TRL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.sparsity.lora import mask_adapters
from sparsellm_lightning.sparsity.masks import Masks, linear_layers, sparse_layers, zero_shares


@contextmanager
def holding_zeros(model: nn.Module) -> Iterator[Masks]:
    """Keep the zeros of a sparse model's linear layers while it is trained by any ``torch.optim`` optimizer.

    ::

        with holding_zeros(model):
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Gradients of pruned weights are zero as soon as they are there, and pruned weights are zero after every optimizer step. LoRA
    adapters (``peft``) on sparse layers are masked, in training as in every later merge. At the end the zeros are compared with
    the masks. Files of adapters hold no masks: after they are loaded on the sparse model, enter this context once before they
    are used or merged.

    Args:
        model: sparse, on one device or wrapped by DDP. For FSDP use :class:`~sparsellm_lightning.SparseFinetuning`.

    Yields:
        the masks.

    Raises:
        UserError: no linear layer has zeros besides a few whole rows, or a weight is computed from others
            (``torch.nn.utils.prune``, parametrizations).
        MaskError: at the end, if something other than an optimizer changed the zeros.
    """
    layers, adapter = linear_layers(model), StrategyAdapter()
    shares = zero_shares(layers, adapter)
    sparse = sparse_layers(layers, shares, adapter)
    if not sparse:
        raise UserError(
            f"holding_zeros keeps the zeros of a sparse model, but no linear layer of {type(model).__name__} has any "
            "besides a few whole rows. Load a pruned model."
        )
    computed = next((p.name for p in sparse if not p.parameter.is_leaf), None)
    if computed is not None:
        raise UserError(
            f"The zeros of {computed} are computed in every forward, by a mask or a parametrization. Make them permanent, with "
            "torch.nn.utils.prune.remove or remove_parametrizations."
        )
    masks = Masks(sparse, adapter)
    mask_adapters(model, {p.module for p in sparse})
    with ExitStack() as hooks:
        for parameter in {p.parameter for p in masks.projections if p.parameter.requires_grad}:
            hook = parameter.register_post_accumulate_grad_hook(lambda changed: masks.mask_gradients([changed]))
            hooks.callback(hook.remove)
        hooks.callback(register_optimizer_step_post_hook(lambda *_: masks.apply()).remove)
        yield masks
    masks.check()
