"""A causal language model in two parts: its decoder once, and what follows the decoder on some positions at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import patched_forward

Forward = Callable[[], Tensor | None]
"""A forward of the whole model: its logits, or None if this rank has no part of the batch."""


def decoder_output(model: PreTrainedModel, forward: Forward, shape: tuple[int, ...]) -> Any | None:
    """The output of the model's decoder, with ``last_hidden_state`` (batch, sequence, d), through which gradients can flow.

    Calls ``forward`` once. The head gets the first position only, so that it costs little. None if the forward does not call
    the decoder exactly once on tokens of this shape, or does not compute its logits from ``last_hidden_state``. The caller must
    then compute all logits by a whole forward.

    Args:
        model: with a language-model head.
        forward: of the model.
        shape: (batch, sequence) of its tokens. Of an empty batch, any.
    """
    decoder = _decoder(model)
    if decoder is None:
        return None
    run, found = decoder.forward, []

    def record(*args: Any, **kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or (shape[0] and hidden.shape[:2] != shape):
            return output
        found.append(output)
        return _at(output, hidden[:, :1])

    with patched_forward(decoder, record):
        logits = forward()
    # ProphetNet's logits come from another part of the output.
    follows = logits is None or logits.shape[1] == 1
    return found[0] if len(found) == 1 and follows else None


def logits_at(model: PreTrainedModel, forward: Forward, output: Any, hidden: Tensor) -> Tensor | None:
    """Logits for some positions, (batch, positions, vocabulary). The decoder does not run.

    Args:
        model, forward: as for :func:`decoder_output`.
        output: of the decoder.
        hidden: its ``last_hidden_state`` at these positions, (batch, positions, d).
    """
    piece = _at(output, hidden)
    with patched_forward(_decoder(model), lambda *_, **__: piece), _weights_first(model):
        return forward()


@contextmanager
def head_in(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """The head's weights are rounded to a dtype inside this context, so that autocast does not round them at every call.

    Embeddings that share the weights keep theirs. Nothing happens if the dtype is None, or if the head is not a plain linear
    layer without bias.
    """
    head = plain_head(model)
    if dtype is None or head is None:
        yield
        return
    with with_weight(head, head.weight.detach().to(dtype)):
        yield


@contextmanager
def with_weight(head: nn.Linear, weight: Tensor) -> Iterator[None]:
    """The head has another weight inside this context."""
    own, head.weight = head.weight, nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        head.weight = own


@contextmanager
def _weights_first(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU the head computes ``(W hᵀ)ᵀ`` instead of ``h Wᵀ`` in this context. The logits are a transposed view.

    Kernels repack the second factor of a product, and h is much smaller than W.
    """
    head = plain_head(model)
    if head is None or head.weight.device.type != "cpu":
        yield
        return

    def product(hidden: Tensor) -> Tensor:
        logits: Tensor = (head.weight @ hidden.flatten(0, -2).T).T.unflatten(0, hidden.shape[:-1])
        return logits

    with patched_forward(head, product):
        yield


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head, if it is a plain linear layer without bias."""
    head: Any = model.get_output_embeddings()
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.bias is None
    return head if plain else None


def _decoder(model: PreTrainedModel) -> Any:
    """What is in front of the head. Llama 4 names itself."""
    decoder: Any = model.get_decoder()
    if decoder is model:
        return next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    return decoder


def _at(output: Any, hidden: Tensor) -> Any:
    piece = copy.copy(output)
    # Torch copies the head's weights for an input with the strides of a slice. contiguous() leaves those of one window.
    piece.last_hidden_state = hidden.flatten(0, 1).view(hidden.shape)
    return piece
