"""Masked reconstruction: the kept weights of a pruned block, tuned by gradient on the block's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from sparsellm_lightning.architectures import Block, device_of
from sparsellm_lightning.config import Reconstruction
from sparsellm_lightning.masks import local_tensor
from sparsellm_lightning.stopwatch import count
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.stream import Stream

LOOKS = 4  # at the held-out error while tuning, at most, besides the one before it
STEPS_A_LOOK = 16  # at least: a look costs several steps
WARM_UP = 0.1  # of the steps; without it the first ones undo much of what the solver found
LEAST_SCALE = 1e-3  # of a parameter's entries, so that biases that are zero move too
BETAS = (0.9, 0.95)  # of Adam: the usual 0.999 remembers more steps than there are


class Reconstructor:
    """Tunes one block.

    Minimises over the kept weights, their mask being fixed, by Adam,

        Σ_t ‖B(h_t) − g_t‖² / ‖g_t‖²

    where h are the hidden states in front of block B and g those that should come out of it. Dividing each token's error by
    its target's size measures it as the norm of the next block will see it: otherwise the few tokens with huge hidden
    states would be all that counts.

    A parameter's learning rate rises for a tenth of the steps to ``learning_rate · rms / ρ`` and falls along a half cosine.
    rms is the root mean square of its kept entries, ρ their share: models differ in the scale of their weights, and the
    fewer weights are left, the further each has to move, and the less they follow the noise of the text.

    Gradients are summed over ranks, each of which has its own tokens; parameters below float32 have float32 masters.
    Sharded parameters are tuned shard by shard.

    Args:
        block: a pruned one; a weight of its that is zero stays zero.
        stream: hidden states in front of it.
        goal: hidden states that should come out, per calibration batch as in the stream.
        adapter: of the strategy the model runs under.
        options: how long and how fast.
        autocast: dtype of the products in forward and backward where parameters are float32; None for float32.
        seed: of the order of batches.
    """

    def __init__(
        self,
        block: Block,
        stream: Stream,
        goal: Sequence[Tensor],
        adapter: StrategyAdapter,
        options: Reconstruction,
        autocast: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.block, self.stream, self.goal, self.adapter, self.options = block, stream, goal, adapter, options
        self.autocast = autocast
        self.device = device_of(block.module)
        self.generator = torch.Generator().manual_seed(seed + block.index)
        weights = {id(p.parameter) for p in block.projections()}
        self.parameters = [
            parameter
            for name, parameter in block.module.named_parameters()
            if id(parameter) in weights or (options.others and "lora_" not in name)
        ]
        pruned = {id(p.parameter) for p in block.projections() if p.pruned}
        self.locals = [local_tensor(parameter) for parameter in self.parameters]
        self.masters = [local.float() for local in self.locals]  # the parameter's own memory where it is float32
        self.kept = [
            local != 0 if id(parameter) in pruned else None
            for local, parameter in zip(self.locals, self.parameters, strict=True)
        ]
        self.fitted = stream.fitted_by_batch()
        self.tokens = _fitted_tokens(stream)
        held_out = torch.tensor([sum(stream.windows[stream.fitted :])], device=self.device)
        adapter.ranks.sum_(held_out)
        self.guarded = int(held_out) > 0

    def tune(self) -> tuple[list[tuple[float, float]], int]:
        """Tune the block in place and keep the best of what was looked at.

        Returns:
            the relative errors (fitted, held out) before and after, ``Σ min(‖B(h) − g‖²w, 1) / Σ min(‖h − g‖²w, 1)`` with
            ``w = 1/‖g‖²``, NaN where nothing is held out; and how many steps were kept. The choice is made on held-out
            tokens, or on the fitted ones where there are none. A token counts for 1 at most: one that wrongly gets
            the huge hidden state of an attention sink, a hundred times the usual, would outweigh thousands of others.
        """
        steps = self.options.steps
        rate = self.options.learning_rate
        groups = [
            {"params": [master], "lr": rate * scale} for master, scale in zip(self.masters, self._scales(), strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, steps))
        before = best_errors = self.errors()
        looks = min(LOOKS, max(steps // STEPS_A_LOOK, 1)) if self.guarded else 1
        best, best_step = [master.clone() for master in self.masters], 0
        with self._trainable():
            for step, batches in zip(range(steps), self._batches(), strict=False):
                for master, gradient in zip(self.masters, self._gradients(batches), strict=True):
                    master.grad = gradient
                optimizer.step()
                schedule.step()
                self._store()
                if (step + 1) * looks // steps > step * looks // steps:
                    errors = self.errors(held_out_only=self.guarded and step + 1 < steps)
                    if errors[int(self.guarded)] < best_errors[int(self.guarded)]:  # False for NaN
                        best_errors, best_step = errors, step + 1
                        best = [master.clone() for master in self.masters]
        for master, kept in zip(self.masters, best, strict=True):
            master.copy_(kept)
        self._store()
        return [before, self.errors() if 0 < best_step < steps else best_errors], best_step

    @torch.no_grad()
    def errors(self, held_out_only: bool = False) -> tuple[float, float]:
        """Relative errors over all ranks: of fitted tokens (NaN where not measured), and of the held-out ones.

        Where some are held out they are what matters, and of the fitted batches only about as many are measured.
        """
        with_held_out = sum(fitted < len(goal) for fitted, goal in zip(self.fitted, self.goal, strict=True))
        fitted_batches = 0 if held_out_only else max(with_held_out, 1) if self.guarded else len(self.fitted)
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.device)  # (fitted, held out) x (error, scale)
        with self.adapter.holding(self.block.module):
            for index, fitted in enumerate(self.fitted):
                needed = index < fitted_batches or fitted < len(self.goal[index])
                if not needed and not self.adapter.forward_is_collective:
                    continue
                with self.adapter.forward_context():
                    output = self._forward(index)
                self._count(index, 1)
                hidden = self.stream.hidden[index].to(self.device)
                parts = (slice(fitted if index < fitted_batches else 0), slice(fitted, None))
                for part, rows in enumerate(parts):
                    for column, state in enumerate((output, hidden)):
                        sums[part, column] += self._distances(state, index, rows).clamp(max=1).sum().double()
        self.adapter.ranks.sum_(sums)
        (error, scale), (held_out_error, held_out_scale) = sums.tolist()
        return (
            math.nan if held_out_only else error / (scale or 1.0),
            held_out_error / held_out_scale if held_out_scale else math.nan,
        )

    def _forward(self, index: int) -> Tensor:
        args, kwargs = self.stream.arguments[self.block.index][index]
        returned = self.block.module(self.stream.hidden[index].to(self.device, non_blocking=True), *args, **kwargs)
        output: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output

    def _distances(self, output: Tensor, index: int, rows: slice) -> Tensor:
        """``‖output − g‖² / ‖g‖²`` of the tokens of some rows of a batch, (rows, length); 0 where they are not valid."""
        goal = self.goal[index][rows].to(self.device, torch.float32, non_blocking=True)
        distances = (output[rows].float() - goal).square().sum(-1) / goal.square().sum(-1).clamp(min=1e-12)
        valid = self.stream.valid[index]
        return distances if valid is None else distances * valid[rows].to(self.device)

    def _batches(self) -> Iterator[list[int]]:
        """Batch indices of this rank for each step: every fitted batch once, in random order, then again."""
        mine, together = _of_a_step(self.stream, self.options, self.adapter, self.device)
        queue: list[int] = []
        while True:
            while mine and len(queue) < together:
                queue += [mine[i] for i in torch.randperm(len(mine), generator=self.generator).tolist()]
            chosen, queue = queue[:together], queue[together:]
            yield chosen

    def _gradients(self, batches: list[int]) -> list[Tensor]:
        """Of the mean relative error of these batches' fitted tokens over all ranks, float32, this rank's part."""
        ranks = self.adapter.ranks
        count = torch.tensor([sum(self.tokens[index] for index in batches)], device=self.device)
        ranks.sum_(count)
        # FSDP averages gradients over ranks as it scatters them.
        scale = (ranks.size if self.adapter.weights_are_split else 1) / max(int(count), 1)
        for index in batches:
            with torch.enable_grad(), self.adapter.forward_context(), self._autocast():
                output = self._forward(index)
                self._count(index, 3)  # the backward is two products for each of the forward's
            with torch.enable_grad():
                (self._distances(output, index, slice(self.fitted[index])).sum() * scale).backward()
        gradients = []
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = local_tensor(gradient).float()
            parameter.grad = None
            gradients.append(gradient if kept is None else gradient.mul_(kept))  # masked_fill_ takes four times as long
        if ranks.size > 1 and not self.adapter.weights_are_split:
            message = torch.cat([gradient.flatten() for gradient in gradients])
            ranks.sum_(message)
            for gradient, summed in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        return gradients

    def _count(self, index: int, forwards: int) -> None:
        tokens = self.stream.hidden[index].shape[:2].numel()
        dtype = self.autocast if self.autocast and forwards > 1 else torch.float32
        count(forwards * tokens * self.block.forward_work(max(self.stream.windows)), dtype)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast is None or any(local.dtype != torch.float32 for local in self.locals):
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _scales(self) -> list[float]:
        """Of each parameter, over all of its shards: root mean square of the entries that may change, by their share of all."""
        sums = [
            [
                float(master.square().sum(dtype=torch.float64)),
                float(master.numel() if kept is None else kept.sum()),
                master.numel(),
            ]
            for master, kept in zip(self.masters, self.kept, strict=True)
        ]
        totals = torch.tensor(sums, dtype=torch.float64, device=self.device)
        if self.adapter.weights_are_split:
            self.adapter.ranks.sum_(totals)
        squares, entries, size = totals.clamp(min=1e-30).T
        scales: list[float] = ((squares / entries).sqrt().clamp(min=LEAST_SCALE) * size / entries).tolist()
        return scales

    def _store(self) -> None:
        for local, master in zip(self.locals, self.masters, strict=True):
            if master is not local:
                local.copy_(master)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        """Gradients are taken of the tuned parameters only; what the parameters had is put back afterwards."""
        everything = list(self.block.module.parameters())
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


def _share_of_rate(step: int, steps: int) -> float:
    """Of the largest learning rate, in the given one of so many steps."""
    return min((step + 1) / max(WARM_UP * steps, 1), 1) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches_of_interest(
    stream: Stream, options: Reconstruction, adapter: StrategyAdapter, device: torch.device
) -> list[int]:
    """Which of this rank's batches tuning a block will look at: those held out, and as many of the others as its steps take.

    Where forwards are collective, all: ranks must make the same number.
    """
    mine, together = _of_a_step(stream, options, adapter, device)
    if adapter.forward_is_collective:
        return list(range(len(stream.hidden)))
    tuned = set(mine[: options.steps * together])
    fitted = stream.fitted_by_batch()
    return [i for i, hidden in enumerate(stream.hidden) if i in tuned or fitted[i] < len(hidden)]


def _of_a_step(
    stream: Stream, options: Reconstruction, adapter: StrategyAdapter, device: torch.device
) -> tuple[list[int], int]:
    """This rank's batches with fitted tokens, and how many of them a step takes."""
    tokens = _fitted_tokens(stream)
    mine = [index for index, count in enumerate(tokens) if count]
    mine = mine or list(range(len(tokens)))[:1]  # of no fitted token: a forward all the same
    shapes = torch.tensor([max((tokens[index] for index in mine), default=0), len(mine)], device=device)
    largest, batches = torch.stack(adapter.ranks.gather(shapes)).T.tolist()
    # All ranks make the same number of forwards; no batch is seen twice in a step by the rank with most.
    return mine, min(max(1, round(options.batch_tokens / max(sum(largest), 1))), max(batches))


def _fitted_tokens(stream: Stream) -> list[int]:
    """Of each batch."""
    starts = accumulate((len(hidden) for hidden in stream.hidden), initial=0)
    return [
        sum(stream.windows[start : start + fitted])
        for start, fitted in zip(starts, stream.fitted_by_batch(), strict=False)
    ]
