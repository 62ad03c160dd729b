"""Perplexity with torchmetrics: labels shifted, logits in float32, padding ignored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from sparsellm_lightning.calibration import model_inputs
from sparsellm_lightning.strategies import StrategyAdapter

IGNORED = -100


def new_metric() -> Perplexity:
    """A perplexity metric for :func:`update`."""
    return Perplexity(ignore_index=IGNORED)


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """The batch's ``labels``, or its ``input_ids``; padded positions ignored."""
    labels = batch.get("labels", batch["input_ids"])
    mask = batch.get("attention_mask")
    return labels if mask is None or mask.dim() != 2 else labels.masked_fill(mask == 0, IGNORED)


def update(metric: Perplexity, logits: Tensor, labels: Tensor) -> None:
    """Add the next-token likelihoods of a batch.

    Args:
        metric: from :func:`new_metric`.
        logits: (batch, sequence, vocabulary), any dtype; torchmetrics takes its softmax in the dtype it is given, so they
            are cast to float32.
        labels: (batch, sequence); position t is predicted by the logits at t − 1.
    """
    # One window at a time: torchmetrics holds several copies of what it is given.
    for window_logits, window_labels in zip(logits, labels, strict=True):
        if bool((window_labels[1:] != IGNORED).any()):
            metric.update(window_logits[None, :-1].float(), window_labels[None, 1:])


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, batches: Iterable[Any], adapter: StrategyAdapter | None = None, *, sharded: bool = False
) -> float:
    """Perplexity of a causal LM.

    Args:
        model: with a language-model head.
        batches: ``{"input_ids", ("attention_mask", "labels")}``, or what :func:`~sparsellm_lightning.calibration.model_inputs`
            understands.
        adapter: of the strategy the model runs under. Under several ranks each takes its share of every batch, and all get
            the result over the whole.
        sharded: the batches are already this rank's own.
    """
    adapter = adapter or StrategyAdapter()
    device = next(model.parameters()).device
    metric = new_metric().to(device)
    rank, size = (0, 1) if sharded else (adapter.ranks.rank, adapter.ranks.size)
    with adapter.calibrating(model):
        for batch in batches:
            inputs = {key: value[rank::size].to(device) for key, value in model_inputs(batch).items()}
            labels = batch["labels"][rank::size].to(device) if "labels" in _keys(batch) else None
            logits = adapter.logits(model, inputs)
            if logits is not None:
                update(metric, logits, labels_of(inputs | ({} if labels is None else {"labels": labels})))
    adapter.finish(model)
    return float(metric.compute())


def _keys(batch: Any) -> Iterable[str]:
    return batch.keys() if hasattr(batch, "keys") else ()
