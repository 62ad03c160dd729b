"""How much each feature of the hidden states matters to the model's output."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration.activations import ActivationCache
from sparsellm_lightning.calibration.context import Context
from sparsellm_lightning.calibration.forward import block_output, run_block, tail_logits
from sparsellm_lightning.runtime import phase

TOKENS = 2048  # over all ranks, on which importances are measured
POSITIONS = 64  # of a batch, whose logits are in memory at once


def feature_importance(context: Context, cache: ActivationCache) -> dict[int, Tensor]:
    """The diagonal of the Fisher information of the hidden states behind each block, divided by its mean.

        F_j = Σ_t (∂ Σ_u log q(y_u) / ∂h_tj)²,  y_u sampled from the next-token distribution q at fitted token u

    To second order, a change δ of the hidden states moves the output by the divergence ``½ Σ_j F_j E δ_j²``, if features are
    taken one by one. Where a few features are huge and the next norm's weights shrink them, ``Σ_j δ_j²`` says little about the
    output. Where blocks take keys and values of earlier ones (Gemma 3n), gradients through these are left out.

    Every window uses the same random numbers, so that the result does not depend on how windows lie on ranks. One block's
    forward with gradients is on the device at a time.

    Args:
        context: of the run. The model is dense. All ranks call this together.
        cache: hidden states in front of the first block, of which the first batches are taken. Not changed.

    Returns:
        by block, (d,) float32. Empty if hidden states give no next-token distributions.
    """
    if not context.layout.predicts:
        return {}
    blocks, found = context.layout.blocks, {}
    with phase("importance"):
        moving, in_front = cache.beginning(TOKENS, context.ranks), []
        moving.move_to(torch.device("cpu"))  # those in front of all blocks are kept
        for block in blocks:
            in_front.append(moving.hidden)
            with context.autocast():
                moving.hidden = run_block(context, block, moving)
        gradients = [_of_output(context, moving, index) for index in range(len(moving.hidden))]
        for block in reversed(blocks):
            found[block.index] = _squares(context, moving, gradients)
            if block is not blocks[0]:
                moving.hidden = in_front[block.index]
                gradients = _through(context, block, moving, gradients)
    return found


def _squares(context: Context, cache: ActivationCache, gradients: list[Tensor]) -> Tensor:
    """Sums over all ranks' valid tokens, divided by their mean. Ones where float16 gradients vanish or overflow."""
    size = context.ranks.largest(gradients[0].shape[-1] if gradients else 0)  # a rank may have no windows
    total = torch.zeros(size, dtype=torch.float64, device=context.device)
    for gradient, valid in zip(gradients, cache.valid, strict=True):
        tokens = gradient if valid is None else gradient[valid.to(gradient.device)]
        total += tokens.flatten(0, -2).double().square().sum(0)
    context.ranks.sum_(total)
    mean = total.mean()
    return (total / mean).float() if 0 < float(mean) < math.inf else torch.ones_like(total).float()


def _of_output(context: Context, cache: ActivationCache, index: int) -> Tensor:
    """The gradient of ``Σ_t log q(y_t)`` over a batch's fitted tokens behind the last block, (windows, positions, d).

    As windows do not see each other, it is 0 for windows that are held out, behind every block.
    """
    hidden, valid = cache.hidden[index], cache.valid[index]
    positions = hidden.shape[1]
    counts = (
        torch.ones(hidden.shape[:2], device=context.device)
        if valid is None
        else valid.to(context.device, torch.float32)
    )
    counts[cache.fitted_by_batch()[index] :] = 0
    generator = torch.Generator().manual_seed(context.config.seed)
    uniform = torch.rand(positions, generator=generator).to(context.device)
    gradients: list[Tensor] = []
    starts = list(range(0, positions, POSITIONS))
    surplus = 0
    if context.adapter.forward_is_collective:  # ranks with shorter windows call the head as often
        surplus = context.ranks.largest(len(starts)) - len(starts)
    for start in [*starts, *[0] * surplus]:
        chosen = slice(start, start + POSITIONS)
        with torch.enable_grad(), context.autocast():
            leaf = hidden[:, chosen].detach().to(context.device).requires_grad_()
            log_q = torch.log_softmax(tail_logits(context, leaf).float(), -1)
            level = uniform[chosen].expand(len(leaf), -1).unsqueeze(-1).contiguous()
            with torch.no_grad():
                # Integers, whose sums are the same in any order: GPUs have no reproducible sums of floats.
                sums = (log_q.exp() * 2**30).int().cumsum(-1, dtype=torch.int32)
                level = (level * sums[..., -1:]).int()
                sampled = torch.searchsorted(sums, level, right=True).clamp(max=log_q.shape[-1] - 1)
            likelihood = (log_q.gather(-1, sampled).squeeze(-1) * counts[:, chosen]).sum()
            gradients += torch.autograd.grad(likelihood, leaf)
    return torch.cat(gradients[: len(starts)], 1)


def _through(context: Context, block: Block, cache: ActivationCache, gradients: list[Tensor]) -> list[Tensor]:
    """Gradients in front of a block, from those behind it."""
    found: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        with torch.enable_grad(), context.adapter.forward_context(), context.autocast():
            leaf = cache.hidden[index].detach().to(context.device).requires_grad_()
            forward = partial(block_output, block, leaf, cache.arguments[block.index][index])
            output = context.adapter.with_gradient(forward)
        found += torch.autograd.grad(output, leaf, gradient.to(output.dtype))
    return found
