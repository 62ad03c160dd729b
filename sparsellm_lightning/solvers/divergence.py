"""Divergence of a model's next-token distribution from another's, with its gradient, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ENTRIES = 2**19  # of the logits that are in float32 at once: on a CPU those that its caches hold
GPU_ENTRIES = 2**23
LEAST = -1e4  # log-probability instead of minus infinity, of tokens that a model excludes


def kl_divergence(dense: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``Σ_v p_v (log p_v − log q_v)`` with ``p = softmax(dense / T)`` and ``q = softmax(logits / T)``, of each token.

    The gradient of ``logits`` is ``(q − p) / T``. It is computed in the forward, a few tokens at a time: autograd would keep
    half a dozen float32 copies of all logits, which for a vocabulary of 50,000 is more memory than a small model.

    Args:
        dense: (tokens, vocabulary), any dtype. Computed in float32. It gets no gradient.
        logits: likewise, with a gradient.
        temperature: T > 0.

    Returns:
        (tokens,) float32.
    """
    divergence: Tensor = _KLDivergence.apply(dense, logits, temperature)
    return divergence


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, logits: Tensor, temperature: float) -> Tensor:
        entries = CPU_ENTRIES if logits.device.type == "cpu" else GPU_ENTRIES
        rows = max(1, entries // logits.shape[-1])
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        divergences = [logits.new_empty(0, dtype=torch.float32)]
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            log_p, log_q = (
                torch.log_softmax(x[part].float() / temperature, -1).clamp_(min=LEAST) for x in (dense, logits)
            )
            p = log_p.exp()
            divergences.append(log_p.sub_(log_q).mul_(p).sum(-1))
            if gradient is not None:
                gradient[part] = log_q.exp_().sub_(p).div_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(divergences)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # In place, for memory. Autograd refuses a second backward.
        return None, gradient.mul_(upstream.unsqueeze(-1).to(gradient.dtype)), None
