"""The parameters of pruned blocks that a gradient tunes: kept weights, norms and biases, with the zeros held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import Context
from sparsellm_lightning.distributed import local_tensor

WARM_UP = 0.1  # fraction of the steps. Without it the first steps undo much of the solver's work
LEAST_SCALE = 1e-3  # of a parameter's entries, so that biases that are zero move too
BETAS = (0.9, 0.95)  # of Adam. The usual 0.999 averages over more steps than there are


class KeptParameters:
    """Parameters of some blocks, tuned by Adam without their zeros.

    A parameter's learning rate rises during :data:`WARM_UP` to ``learning_rate · rms / ρ`` and falls along a half cosine. rms
    is the root mean square of its kept entries, ρ their share. So the rate fits the scale of the weights, and is larger where
    fewer weights are left.

    Gradients are summed over ranks, each of which has its own tokens. Parameters below float32 have float32 masters. Sharded
    parameters are tuned shard by shard.

    Args:
        context: of the run.
        blocks: pruned. Their zeros stay zero.
        learning_rate: in units of each parameter's scale.
        steps: that are planned.
    """

    def __init__(self, context: Context, blocks: Sequence[Block], learning_rate: float, steps: int) -> None:
        self.adapter, self.ranks = context.adapter, context.ranks
        self.blocks = blocks
        projections = [p for block in blocks for p in block.projections()]
        weights = {id(p.parameter) for p in projections}
        self.parameters = [
            parameter
            for block in blocks
            for name, parameter in block.module.named_parameters()
            if id(parameter) in weights or "lora_" not in name
        ]
        pruned = {id(p.parameter) for p in projections if p.pruned}
        self.locals = [local_tensor(parameter) for parameter in self.parameters]
        self.masters = [local.float() for local in self.locals]  # shares the memory of a float32 parameter
        self.masks = [
            local != 0 if id(parameter) in pruned else None
            for local, parameter in zip(self.locals, self.parameters, strict=True)
        ]
        groups = [
            {"params": [master], "lr": learning_rate * scale}
            for master, scale in zip(self.masters, self._scales(), strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _share_of_rate(step, steps))

    @property
    def below_float32(self) -> bool:
        """Whether some parameters are below float32."""
        return any(local.dtype != torch.float32 for local in self.locals)

    def step(self) -> None:
        """Take the gradients of all ranks and change the parameters once."""
        for master, gradient in zip(self.masters, self._gradients(), strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.schedule.step()
        self.store()

    def state(self) -> list[Tensor]:
        """A copy of the values."""
        return [master.clone() for master in self.masters]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to a copy."""
        for master, kept in zip(self.masters, state, strict=True):
            master.copy_(kept)
        self.store()

    def store(self) -> None:
        """Copy masters into parameters below float32."""
        for local, master in zip(self.locals, self.masters, strict=True):
            if master is not local:
                local.copy_(master)

    @contextmanager
    def trainable(self, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Only these parameters get gradients. Flags and gradients of the modules' parameters are restored at the end."""
        everything = [parameter for module in modules for parameter in module.parameters()]
        before = [(parameter.requires_grad, parameter.grad) for parameter in everything]
        tuned = {id(parameter) for parameter in self.parameters}
        for parameter in everything:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in tuned)
        try:
            yield
        finally:
            for parameter, (requires_grad, gradient) in zip(everything, before, strict=True):
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

    def _gradients(self) -> list[Tensor]:
        """Gradients over all ranks, float32, this rank's part, 0 where a weight is 0. Those of the parameters are freed."""
        gradients = []
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = local_tensor(gradient).float()
            parameter.grad = None
            gradients.append(gradient if mask is None else gradient.mul_(mask))  # masked_fill_ takes four times as long
        if self.ranks.size > 1 and not self.adapter.weights_are_split:
            message = torch.cat([gradient.flatten() for gradient in gradients])
            self.ranks.sum_(message)
            for gradient, summed in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        return gradients

    def _scales(self) -> list[float]:
        """``rms / ρ`` of each parameter, over all of its shards."""
        sums = [
            [
                float(master.square().sum(dtype=torch.float64)),
                float(master.numel() if mask is None else mask.sum()),
                master.numel(),
            ]
            for master, mask in zip(self.masters, self.masks, strict=True)
        ]
        totals = torch.tensor(sums, dtype=torch.float64, device=self.masters[0].device)
        if self.adapter.weights_are_split:
            self.ranks.sum_(totals)
        squares, entries, size = totals.clamp(min=1e-30).T
        scales: list[float] = ((squares / entries).sqrt().clamp(min=LEAST_SCALE) * size / entries).tolist()
        return scales


def _share_of_rate(step: int, steps: int) -> float:
    """The learning rate at a step, as a fraction of the largest one."""
    return min((step + 1) / max(WARM_UP * steps, 1), 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
