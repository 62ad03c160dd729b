"""How a model continues a text: what perplexity does not show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import device_of
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.models.evaluation import model_inputs


def first_prompts(batches: Iterable[Any], count: int, length: int) -> Tensor | None:
    """The first tokens of the first windows, (at most ``count``, ``length``). None if there are no such token ids."""
    prompts: list[Tensor] = []
    for batch in batches:
        inputs = model_inputs(batch)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or ids.shape[1] < length or (mask is not None and not bool(mask[:, :length].all())):
            break
        prompts += ids[:, :length].cpu()
        if len(prompts) >= count:
            break
    return torch.stack(prompts[:count]) if prompts else None


@torch.no_grad()
def continued(model: PreTrainedModel, prompts: Tensor, count: int, adapter: StrategyAdapter | None = None) -> Tensor:
    """The likeliest next token, ``count`` times, (batch, ``count``) on the CPU.

    Args:
        model: with a language-model head.
        prompts: (batch, length), on any device.
        count: number of tokens.
        adapter: of the strategy the model runs under. None: a single device. All ranks call this together.
    """
    adapter = adapter or StrategyAdapter()
    tokens = prompts.to(device_of(model))
    with adapter.ranks.failing_together("Generation"), adapter.calibrating(model):
        for _ in range(count):
            tokens = torch.cat([tokens, adapter.next_logits(model, tokens, None).argmax(-1, keepdim=True)], 1)
    adapter.finish(model)
    return tokens[:, prompts.shape[1] :].cpu()
