"""Divergence of a model's next-token distribution from another's, with its gradient, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ENTRIES = 2**18  # limit on the float32 logits at once on a CPU, so that they stay in its caches
GPU_ENTRIES = 2**23
TOKENS = 512  # largest number of tokens at once. CPU_ENTRIES / tokens is then the number of vocabulary entries
LEAST = -1e4  # lower limit of (logit − largest) / T, so that a minus infinity of an excluded token stays finite


def kl_divergence(dense: Tensor, logits: Tensor, temperature: float = 1.0, *, reuse: bool = False) -> Tensor:
    """``Σ_v p_v (log p_v − log q_v)`` with ``p = softmax(dense / T)`` and ``q = softmax(logits / T)``, of each token.

    The gradient of ``logits`` is ``(q − p) / T``. It is computed in the forward, a part of the vocabulary at a time: autograd
    would keep half a dozen float32 copies of all logits, which for a vocabulary of 50,000 is more memory than a small model.

    Args:
        dense: (tokens, vocabulary), any dtype. Computed in float32. It gets no gradient.
        logits: likewise, with a gradient.
        temperature: T > 0.
        reuse: the gradient, if one is needed, may overwrite ``dense``, to save memory. ``dense`` and ``logits`` must have the
            same dtype. Float16 gradients need float32 memory, so ``dense`` is then left as it is.

    Returns:
        (tokens,) float32.
    """
    divergence: Tensor = _KLDivergence.apply(dense, logits, temperature, reuse)
    return divergence


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, logits: Tensor, temperature: float, reuse: bool) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[1]:
            # Float16 cannot hold entries below 6e-8, which the loss scale lifts only in the backward.
            half = logits.dtype == torch.float16
            kind = torch.float32 if half else logits.dtype
            gradient = dense if reuse and not half else torch.empty_like(logits, dtype=kind)
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        divergences = [logits.new_empty(0, dtype=torch.float32)]
        for start in range(0, len(logits), TOKENS):
            some = slice(start, start + TOKENS)
            into = None if gradient is None else gradient[some]
            divergences.append(_divergence(dense[some], logits[some], temperature, into))
        return torch.cat(divergences)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place, for memory. Autograd refuses a second backward.
        return None, gradient.mul_(upstream.unsqueeze(-1).to(gradient.dtype)).to(ctx.dtype), None, None


def _divergence(dense: Tensor, logits: Tensor, temperature: float, gradient: Tensor | None) -> Tensor:
    """See :func:`kl_divergence`. Needs a token. Writes the gradient into ``gradient``, which may share ``dense``'s memory."""
    tokens, vocabulary = logits.shape
    columns = max(1, (CPU_ENTRIES if logits.device.type == "cpu" else GPU_ENTRIES) // tokens)
    parts = [slice(start, start + columns) for start in range(0, vocabulary, columns)]
    # log p = a − log Σ exp(a), where a is a logit minus the largest one, divided by T.
    largest = [x.amax(-1, keepdim=True).float() for x in (dense, logits)]

    def below(part: slice) -> list[Tensor]:
        pairs = zip((dense, logits), largest, strict=True)
        return [(x[:, part] - most).div_(temperature).clamp_(min=LEAST) for x, most in pairs]

    sum_p, sum_q, weighted = logits.new_zeros(3, tokens, 1, dtype=torch.float32)
    for part in parts:
        a, b = below(part)
        p = a.exp()
        sum_p += p.sum(-1, keepdim=True)
        weighted += a.sub_(b).mul_(p).sum(-1, keepdim=True)
        sum_q += b.exp_().sum(-1, keepdim=True)
    if gradient is not None:
        for part in parts:
            p, q = (x.exp_().div_(temperature * total) for x, total in zip(below(part), (sum_p, sum_q), strict=True))
            gradient[:, part] = q.sub_(p)
    divergence: Tensor = (weighted / sum_p - sum_p.log() + sum_q.log()).squeeze(-1)
    return divergence
