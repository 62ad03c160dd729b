"""Some tokens of a large vocabulary in place of all of them, where the head would take most of the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm_lightning.models.head import plain_head, with_weight

LIKELY = 32  # likeliest tokens of each position that are in the sample
OTHERS = 4096  # tokens that are drawn from the others


@dataclass(frozen=True)
class VocabularySample:
    """Some tokens that stand for the whole vocabulary in a softmax.

    Of n tokens that are not likely anywhere, k are drawn at random, and each counts n / k times:

        Σ_v exp(a_v) ≈ Σ_{v in sample} exp(a_v + log w_v),    w_v = 1 for likely tokens and n / k for the drawn ones

    Jean et al., arXiv 1412.2007, sample the softmax of translation models so.

    Args:
        tokens: (sample,) int64.
        log_weights: log w, (sample,) float32.
    """

    tokens: Tensor
    log_weights: Tensor

    @classmethod
    def draw(cls, likely: Tensor, generator: torch.Generator) -> VocabularySample:
        """All likely tokens, and :data:`OTHERS` of the others.

        Args:
            likely: (vocabulary,) bool.
            generator: of the CPU.
        """
        rest = (~likely).nonzero().squeeze(1)
        drawn = rest[torch.randperm(len(rest), generator=generator)[:OTHERS].to(rest.device)]
        tokens = torch.cat([likely.nonzero().squeeze(1), drawn])
        log_weights = torch.zeros(len(tokens), device=likely.device)
        if len(drawn):
            log_weights[-len(drawn) :] = math.log(len(rest) / len(drawn))
        return cls(tokens, log_weights)

    def in_head(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Logits inside this context are those of the sample's tokens, in their order. See :func:`can_sample`."""
        return _rows_in_head(model, self.tokens)


def size_of_sample(vocabulary: int) -> int:
    """About how many tokens a sample has: all of a small vocabulary."""
    return min(vocabulary, 2 * OTHERS)


def likely_tokens(logits: Tensor) -> Tensor:
    """Whether a token is among the :data:`LIKELY` likeliest at some position, (vocabulary,) bool, of (..., vocabulary)."""
    found = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    logits = logits.contiguous()  # topk is twice as slow on the transposed view that the head gives on a CPU
    found[logits.topk(min(LIKELY, logits.shape[-1]), -1).indices.flatten()] = True
    return found


@torch.no_grad()
def can_sample(model: PreTrainedModel, logits: Callable[[], Tensor]) -> bool:
    """Whether a sample of the vocabulary saves work, and the model can give its logits alone.

    The head must be a plain linear layer without bias, and what follows it must work entry by entry. Chameleon, for one, masks
    the logits of some tokens by their number.

    Args:
        model: with a language-model head.
        logits: computes logits of some positions, (..., vocabulary).
    """
    head = plain_head(model)
    if head is None or size_of_sample(len(head.weight)) == len(head.weight):
        return False
    whole = logits()

    def gives(rows: slice) -> bool:
        try:
            with _rows_in_head(model, rows):
                some = logits()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # shapes that do not fit, such as of a bias for each token
            return False
        wanted = whole[..., rows]
        tolerance = 1e-2 * float(wanted.abs().median())
        return some.shape == wanted.shape and torch.allclose(some, wanted, rtol=1e-2, atol=tolerance)

    # Without the first token every id shifts by one: code that edits logits by token id then edits other logits. That is found
    # before ids can exceed the number of rows, which on a GPU ends the process. Without half of the tokens, a softmax changes.
    return whole.shape[-1] == len(head.weight) and gives(slice(1, None)) and gives(slice(len(head.weight) // 2, None))


def _rows_in_head(model: PreTrainedModel, rows: Tensor | slice) -> AbstractContextManager[None]:
    """The head has these rows of its weight only."""
    head = plain_head(model)
    assert head is not None
    return with_weight(head, head.weight.detach()[rows])
