"""Losses of next-token distributions, with their gradients, from logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ENTRIES = 2**18  # limit on the float32 logits at once on a CPU, so that they stay in its caches
GPU_ENTRIES = 2**23
TOKENS = 512  # largest number of tokens at once. CPU_ENTRIES / tokens is then the number of vocabulary entries
IGNORED = -100  # as target: there is none
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
    divergence: Tensor = _Loss.apply(logits, dense if reuse else None, TOKENS, partial(_divergence, dense, temperature))
    return divergence


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``−log softmax(logits)[target]`` of each token, and 0 where the target is −100.

    The gradient, ``softmax(logits)`` minus 1 at the target, is computed in the forward, as for :func:`kl_divergence`. PyTorch's
    function holds three float32 tensors as large as the logits in its backward. Here the backward can run only once.

    Args:
        logits: (tokens, vocabulary), any dtype, with a gradient.
        targets: (tokens,) int64, of the vocabulary or −100.

    Returns:
        (tokens,) float32.
    """
    together = max(1, _entries(logits) // logits.shape[1])
    loss: Tensor = _Loss.apply(logits, None, together, partial(_cross_entropy, targets))
    return loss


class _Loss(torch.autograd.Function):
    """A loss of each token. Its gradient is computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        memory: Tensor | None,
        together: int,
        loss_of: Callable[[slice, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """``loss_of(tokens, their logits, where their gradient is written)`` gets ``together`` tokens at a time.

        ``memory``: of the logits' dtype, for the gradient.
        """
        gradient = None
        if ctx.needs_input_grad[0]:
            # Float16 cannot hold entries below 6e-8, which the loss scale lifts only in the backward.
            half = logits.dtype == torch.float16
            kind = torch.float32 if half else logits.dtype
            gradient = torch.empty_like(logits, dtype=kind) if half or memory is None else memory
            ctx.save_for_backward(gradient)
            ctx.dtype = logits.dtype
        losses = [logits.new_empty(0, dtype=torch.float32)]
        for start in range(0, len(logits), together):
            some = slice(start, start + together)
            losses.append(loss_of(some, logits[some], None if gradient is None else gradient[some]))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place, for memory. Autograd refuses a second backward.
        return gradient.mul_(upstream.unsqueeze(-1).to(gradient.dtype)).to(ctx.dtype), None, None, None


def _cross_entropy(targets: Tensor, some: slice, logits: Tensor, gradient: Tensor | None) -> Tensor:
    """See :func:`cross_entropy`."""
    ignored = (targets[some] == IGNORED).unsqueeze(-1)
    target = targets[some].unsqueeze(-1).masked_fill(ignored, 0)
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    losses = -log_q.gather(-1, target).masked_fill(ignored, 0).squeeze(-1)
    if gradient is not None:
        at_target = torch.full_like(target, -1, dtype=torch.float32)
        gradient.copy_(log_q.exp_().scatter_add_(-1, target, at_target).masked_fill_(ignored, 0))
    return losses


def _divergence(dense: Tensor, temperature: float, some: slice, logits: Tensor, gradient: Tensor | None) -> Tensor:
    """See :func:`kl_divergence`. Needs a token. Writes the gradient into ``gradient``, which may share ``dense``'s memory."""
    dense = dense[some]
    tokens, vocabulary = logits.shape
    columns = max(1, _entries(logits) // tokens)
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


def _entries(logits: Tensor) -> int:
    """How many float32 logits may be in memory at once."""
    return CPU_ENTRIES if logits.device.type == "cpu" else GPU_ENTRIES
