"""Perplexity with torchmetrics, and the model's arguments in a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import context_of, device_of, token_input, vocabulary_of
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.head import Forward, decoder_output, logits_at
from sparsellm_lightning.runtime import tracked
from sparsellm_lightning.solvers import IGNORED, SINGLE, Ranks

# Limit on the logits of several positions in memory at once. Their softmax is a copy, and distillation holds those of two
# models.
LOGITS = 2**24
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")


def model_inputs(batch: Any) -> dict[str, Tensor]:
    """The model's keyword arguments in a batch: a dict, a tensor of token ids, or a sequence that begins with one.

    Raises:
        UserError: another kind of batch, or a sequence that holds a mask, or labels that leave out tokens, too.
    """
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        if any(_is_mask(other, batch[0]) or _are_labels(other, batch[0]) for other in batch[1:]):
            raise UserError(
                "Only the first tensor of a sequence is used, as token ids, but another tensor in this batch looks like an "
                f"attention mask with zeros, or like labels with {IGNORED}. Have the dataloader give a dict with 'input_ids', "
                "and with 'attention_mask' or 'labels' for the other tensor."
            )
        batch = batch[0]
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if hasattr(batch, "items"):
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        inputs = {key: value for key, value in tensors.items() if key in _MODEL_INPUTS}
        if "input_ids" in inputs or "inputs_embeds" in inputs:
            left_out = [k for k, v in tensors.items() if k not in (*inputs, "labels") and v.is_floating_point()]
            if left_out:
                warnings.warn(
                    f"Calibration and perplexity take text alone, without {', '.join(left_out)}. If these hold images or "
                    "audio, their places in the text stay placeholders: calibrate on text without them.",
                    stacklevel=2,
                )
            return inputs
    keys = f" with keys {', '.join(map(str, batch))}" if isinstance(batch, dict) else ""
    raise UserError(
        f"A batch of text must be token ids or a dict with 'input_ids', got {type(batch).__name__}{keys}. Have the dataloaders "
        "for calibration and validation give such batches. (With measure false, validation batches are not read.)"
    )


def _is_mask(other: Any, ids: Tensor) -> bool:
    """Whether a tensor beside token ids holds ones, and zeros at one end of some windows."""
    if not isinstance(other, Tensor) or other.dim() != 2 or other.shape != ids.shape or other.is_floating_point():
        return False
    ends = other[(other != 0).any(1)][:, [0, -1]] == 0  # of windows that are not padding alone
    return bool(ends.any()) and not bool(ends.all(1).any()) and bool(((other == 0) | (other == 1)).all())


def _are_labels(other: Any, ids: Tensor) -> bool:
    """Whether a tensor beside token ids leaves out some of them as labels do."""
    return isinstance(other, Tensor) and other.shape == ids.shape and bool((other == IGNORED).any())


def check_inputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Refuse arguments on which a model's forward would fail, or would look up embeddings that are not there.

    Args:
        model: that is called.
        inputs: as :func:`model_inputs` gives them.

    Raises:
        UserError: token ids that are not (batch, sequence) integers of the vocabulary, int64 or int32, empty windows, or
            windows longer than the model's context.
    """
    ids = inputs.get("input_ids")
    if ids is not None:
        shape = tuple(ids.shape)
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not shape[1]:  # which embeddings take
            raise UserError(
                f"Token ids must be integers of shape (batch, sequence), int64 or int32, at least one token long, got "
                f"{ids.dtype} of shape {shape}. Have the dataloader give such batches."
            )
        vocabulary = vocabulary_of(model)
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        if low < 0 or high >= vocabulary:
            raise UserError(
                f"Token ids must lie in the model's vocabulary, 0 to {vocabulary - 1}, got {low} to {high}. Use the tokenizer "
                "that belongs to the model."
            )
    length = token_input(inputs).shape[1]
    if length > context_of(model):
        raise UserError(
            f"Windows must fit into the model's context of {context_of(model)} tokens, got windows of {length}. Use shorter "
            "windows (data.sequence_length)."
        )


class _Perplexity(Perplexity):
    """torchmetrics' perplexity, from log-probabilities. The base class takes the logarithm of probabilities that may be 0."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (batch, positions, vocabulary) and target tokens (batch, positions)."""
        flat, targets = preds.flatten(0, 1), target.flatten()
        self.total_log_probs += torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
        self.count += (targets != IGNORED).sum()

    def _apply(self, fn: Any, *args: Any) -> Any:
        """Move the sums with their module, but keep them in float32: in 16 bits they would soon stop growing."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), *args)


def new_metric(over_ranks: bool = True) -> Perplexity:
    """A perplexity metric for :func:`update`. ``over_ranks``: whether all processes, if there are several, share it."""
    options: dict[str, Any] = {"sync_on_compute": over_ranks}
    return _Perplexity(ignore_index=IGNORED, **options)


def labels_in(batch: Any) -> Tensor | None:
    """The ``labels`` of a batch, if it is a mapping that has some."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    return labels if isinstance(labels, Tensor) else None


def targets_of(inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
    """The labels, or the ``input_ids``. Padded positions are -100, and the first token after padding on the left.

    Raises:
        UserError: there are neither, or not one label for each token.
    """
    labels = inputs.get("input_ids") if labels is None else labels
    if labels is None:
        raise UserError(
            f"The loss and perplexity need labels or input_ids, but the batches hold {', '.join(inputs)}. Have the dataloader "
            "add labels. (With measure false, pruning needs none.)"
        )
    shape = token_input(inputs).shape[:2]
    if labels.shape != shape:
        raise UserError(
            f"The loss and perplexity need a label for each token, got labels of shape {tuple(labels.shape)} for tokens of "
            f"shape {tuple(shape)}. Leave the labels out. (With measure false, pruning needs none.)"
        )
    labels = labels.long()  # cross entropy takes no other integers
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return labels
    seen = torch.nn.functional.pad((mask != 0).cumsum(1)[:, :-1], (1, 0), value=1)
    return labels.masked_fill((mask == 0) | (seen == 0), IGNORED)  # what sees padding alone predicts nothing


def next_tokens(labels: Tensor) -> Tensor:
    """The label of the following position at each one, (batch, sequence), and -100 at the last.

    Thus the logits of all positions can be compared, without a copy of all but the last ones.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def update(metric: Perplexity, model: PreTrainedModel, labels: Tensor, forward: Forward, ranks: Ranks = SINGLE) -> None:
    """Add the next-token likelihoods of a batch. The logits of a few positions at a time are in memory.

    Args:
        metric: from :func:`new_metric`.
        model: with a language-model head.
        labels: (batch, sequence). The logits at t − 1 predict position t.
        forward: of the model, over the batch. It is called several times.
        ranks: that call the model together, because its weights are split over them.
    """
    following = next_tokens(labels)
    for positions, logits in _logits_in_slices(model, forward, labels.shape, ranks):
        targets = following[:, positions]
        if bool((targets != IGNORED).any()):
            metric.update(logits.float(), targets)


def _logits_in_slices(
    model: PreTrainedModel, forward: Forward, shape: tuple[int, ...], ranks: Ranks
) -> Iterator[tuple[slice, Tensor]]:
    """Logits by slices of positions. For arguments see :func:`update`; ``shape`` is (batch, sequence)."""
    output = decoder_output(model, forward, shape)
    if not ranks.all(output is not None):  # a rank without rows cannot tell
        logits = forward()
        if logits is not None:
            yield slice(None), logits
        return
    assert output is not None
    hidden = output.last_hidden_state
    pieces = positions_together(model, len(hidden), hidden.shape[1])
    for index in range(ranks.largest(len(pieces))):
        positions = pieces[index] if index < len(pieces) else pieces[0]  # because others call the model once more
        logits = logits_at(model, forward, output, hidden[:, positions])
        if logits is not None and index < len(pieces):
            yield positions, logits


def positions_together(model: PreTrainedModel, windows: int, length: int, vocabulary: int | None = None) -> list[slice]:
    """Slices of a window's positions, of which the logits of all windows are at most :data:`LOGITS`, or one position.

    ``vocabulary`` is the number of logits of a position, if it is not the model's.
    """
    most = max(LOGITS // (windows * (vocabulary or model.config.get_text_config().vocab_size)), 1)
    size = -(-length // -(-length // most))  # equal slices: 256 and 256 are faster than 341 and 171
    return [slice(start, start + size) for start in range(0, length, size)]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, batches: Iterable[Any], adapter: StrategyAdapter | None = None, *, sharded: bool = False
) -> float:
    """Perplexity of a causal LM: ``exp(−1/N Σ_t log q(y_t | y_<t))``, computed in float32.

    N counts the predicted tokens. The first token of each window, tokens labelled −100 and padding do not count. NaN if N is 0.
    Some models (GPT-2) count padding on the left as positions, unless the batches have ``position_ids``.

    Args:
        model: with a language-model head.
        batches: ``{"input_ids", ("attention_mask", "labels")}``, or other batches that :func:`model_inputs` accepts.
        adapter: of the strategy the model runs under. None: a single device. Each rank evaluates its share of every batch, and
            all ranks get the result over all batches.
        sharded: whether the batches are this rank's own share already.

    Raises:
        UserError: batches that do not fit the model, or labels that do not fit the tokens.
    """
    adapter = adapter or StrategyAdapter()
    device = device_of(model)
    metric = new_metric(over_ranks=adapter.ranks.size > 1).to(device)
    rank, size = (0, 1) if sharded else (adapter.ranks.rank, adapter.ranks.size)
    with adapter.ranks.failing_together("Evaluation"), adapter.calibrating(model):
        for batch in tracked(batches, "Measuring perplexity", "batch"):
            whole = model_inputs(batch)
            check_inputs(model, whole)
            windows = len(token_input(whole))
            mine = {key: value[rank::size] if len(value) == windows else value for key, value in whole.items()}
            inputs = {key: value.to(device) for key, value in mine.items()}
            labels = labels_in(batch)
            targets = targets_of(inputs, None if labels is None else labels[rank::size].to(device))
            together = adapter.ranks if adapter.forward_is_collective else SINGLE
            update(metric, model, targets, partial(adapter.logits, model, inputs), together)
        adapter.finish(model)
        return float(metric.compute())
