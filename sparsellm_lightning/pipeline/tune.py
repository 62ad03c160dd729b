"""Masked reconstruction: the kept weights of a pruned block, tuned by gradient on the block's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import ActivationCache, Context, block_output
from sparsellm_lightning.pipeline.kept import (
    STEP_TOKENS,
    KeptParameters,
    batches_of_a_step,
    in_random_order,
    memory_of_tuning,
)
from sparsellm_lightning.runtime import dtype_of_products, room
from sparsellm_lightning.solvers import count

LEARNING_RATE = 4e-3  # largest one, in units of each parameter's scale
MAX_CHECKS = 4  # of the held-out error while tuning, besides the one before
STEPS_A_CHECK = 16  # smallest number of steps between two checks, each of which costs several steps


class Reconstructor:
    """Tunes one block.

    Minimises over the kept weights, norms and biases, with the mask fixed, by Adam,

        Σ_t ‖B(h_t) − g_t‖² / ‖g_t‖²  with  ‖x‖² = Σ_j F_j x_j²

    where h are the hidden states in front of block B, g the goal behind it, and F the importance of features. Dividing by the
    goal's size measures a token's error as the next block's norm sees it: otherwise the few tokens with huge hidden states
    would dominate the sum. Without F a few huge features would.

    For learning rates, ranks and shards see :class:`~sparsellm_lightning.pipeline.kept.KeptParameters`.

    Args:
        context: of the run. The settings give the number of steps and the seed of the order of batches.
        block: pruned. Its zeros stay zero.
        cache: hidden states in front of the block.
        goal: hidden states that should come out, by batch of the cache.
        importance: of their features, (d,) float32, see :func:`~sparsellm_lightning.calibration.feature_importance`. None: all
            alike.
        learning_rate: in units of each parameter's scale.
        batch_tokens: tokens of a step, over all ranks, in whole windows and at least one on each rank.
    """

    def __init__(
        self,
        context: Context,
        block: Block,
        cache: ActivationCache,
        goal: Sequence[Tensor],
        importance: Tensor | None = None,
        learning_rate: float = LEARNING_RATE,
        batch_tokens: int = STEP_TOKENS,
    ) -> None:
        self.context, self.block, self.cache, self.goal = context, block, cache, goal
        self.adapter, self.ranks = context.adapter, context.ranks
        self.importance = 1.0 if importance is None else importance
        self.batch_tokens = batch_tokens
        self.device = context.device
        self.generator = torch.Generator().manual_seed(context.config.seed + block.index)
        _, vectors = memory_of_tuning([block], context.config, self.adapter.weights_are_split)
        # All ranks agree, because Adam rounds otherwise on another device.
        fits = self.ranks.all(vectors <= room(context.config.memory, self.device))
        steps = context.config.reconstruction_steps
        storage = self.device if fits else torch.device("cpu")
        self.parameters = KeptParameters(context, [block], learning_rate, steps, storage)
        self.fitted = cache.fitted_by_batch()
        self.tokens = cache.fitted_tokens_by_batch()
        self.guarded = self.ranks.total(sum(cache.windows[cache.fitted :])) != [0]

    def tune(self) -> tuple[list[tuple[float, float]], int]:
        """Tune the block in place and keep the best of the checked states.

        The choice is made on held-out tokens, or on the fitted ones if there are none.

        Returns:
            the relative errors (fitted, held out) before and after, ``Σ min(‖B(h) − g‖²w, 1) / Σ min(‖h − g‖²w, 1)`` with
            ``w = 1/‖g‖²``, NaN if nothing is held out; and the number of steps kept. A token counts for 1 at most, because
            one that wrongly gets the huge hidden state of an attention sink would outweigh thousands of others.
        """
        steps = self.context.config.reconstruction_steps
        before = best_errors = self.errors()
        checks = min(MAX_CHECKS, max(steps // STEPS_A_CHECK, 1)) if self.guarded else 1
        best, best_step = self.parameters.state(), 0
        order = in_random_order(*_batches_of_steps(self.context, self.cache, self.batch_tokens), self.generator)
        with self.parameters.trainable([self.block.module]):
            for step, batches in zip(range(steps), order, strict=False):
                self._add_gradients(batches)
                self.parameters.step()
                if (step + 1) * checks // steps > step * checks // steps:
                    errors = self.errors(held_out_only=self.guarded and step + 1 < steps)
                    if errors[int(self.guarded)] < best_errors[int(self.guarded)]:  # False for NaN
                        best_errors, best_step = errors, step + 1
                        self.parameters.update(best)
        self.parameters.restore(best)
        return [before, self.errors() if 0 < best_step < steps else best_errors], best_step

    @torch.no_grad()
    def errors(self, held_out_only: bool = False) -> tuple[float, float]:
        """Relative errors over all ranks of fitted tokens (NaN if not measured), and of held-out tokens.

        If windows are held out, at most as many fitted batches are measured as there are batches with held-out windows (at
        least one).
        """
        with_held_out = sum(fitted < len(goal) for fitted, goal in zip(self.fitted, self.goal, strict=True))
        fitted_batches = 0 if held_out_only else max(with_held_out, 1) if self.guarded else len(self.fitted)
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.device)  # (fitted, held out) x (error, scale)
        with self.adapter.holding(self.block.module):
            for index, fitted in enumerate(self.fitted):
                needed = index < fitted_batches or fitted < len(self.goal[index])
                if not needed and not self.adapter.forward_is_collective:
                    continue
                with self.adapter.forward_context(), self._autocast():
                    output = self._forward(index)
                    self._count(index, 1)
                hidden = self.cache.hidden[index].to(self.device)
                parts = (slice(fitted if index < fitted_batches else 0), slice(fitted, None))
                for part, rows in enumerate(parts):
                    for column, state in enumerate((output, hidden)):
                        sums[part, column] += self._distances(state, index, rows).clamp(max=1).sum().double()
        self.ranks.sum_(sums)
        (error, scale), (held_out_error, held_out_scale) = sums.tolist()
        return (
            math.nan if held_out_only else error / (scale or 1.0),
            held_out_error / held_out_scale if held_out_scale else math.nan,
        )

    def _forward(self, index: int) -> Tensor:
        hidden = self.cache.hidden[index].to(self.device, non_blocking=True)
        return block_output(self.block, hidden, self.cache.arguments[self.block.index][index])

    def _distances(self, output: Tensor, index: int, rows: slice) -> Tensor:
        """``‖output − g‖² / ‖g‖²`` of the tokens of some rows of a batch, (rows, length). 0 for padding."""
        goal = self.goal[index][rows].to(self.device, torch.float32, non_blocking=True)
        squares = [(t.square() * self.importance).flatten(2).sum(-1) for t in (output[rows].float() - goal, goal)]
        distances = squares[0] / squares[1].clamp(min=1e-12)
        valid = self.cache.valid[index]
        return distances if valid is None else distances * valid[rows].to(self.device)

    def _add_gradients(self, batches: list[int]) -> None:
        """Add the gradient of the mean relative error, over all ranks, of this rank's fitted tokens in these batches."""
        (tokens,) = self.ranks.total(sum(self.tokens[index] for index in batches))
        scale = self.parameters.loss_scale(tokens)
        for index in batches:
            with torch.enable_grad(), self.adapter.forward_context(), self._autocast():
                output = self.adapter.with_gradient(partial(self._forward, index))
                self._count(index, 3)  # the backward has two products for each product of the forward
            with torch.enable_grad():
                (self._distances(output, index, slice(self.fitted[index])).sum() * scale).backward()
            self.parameters.collect()

    def _count(self, index: int, forwards: int) -> None:
        tokens = self.cache.hidden[index].shape[:2].numel()
        dtype = dtype_of_products(next(self.block.module.parameters()))
        count(forwards * tokens * self.block.forward_work(max(self.cache.windows)), dtype)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.parameters.below_float32 else self.context.autocast()


def batches_of_interest(context: Context, cache: ActivationCache, batch_tokens: int = STEP_TOKENS) -> list[int]:
    """This rank's batches that tuning a block uses: those with held-out windows, and the fitted ones that its steps visit.

    If forwards are collective, all batches, because ranks must make equally many forwards.
    """
    if context.adapter.forward_is_collective:
        return list(range(len(cache.hidden)))
    tuned, _ = _batches_of_steps(context, cache, batch_tokens)
    fitted = cache.fitted_by_batch()
    return [i for i, hidden in enumerate(cache.hidden) if i in tuned or fitted[i] < len(hidden)]


def _batches_of_steps(context: Context, cache: ActivationCache, batch_tokens: int) -> tuple[list[int], int]:
    """This rank's first batches with fitted tokens, as many as the steps can visit, and the number that a step takes."""
    tokens = cache.fitted_tokens_by_batch()
    mine = [index for index, count in enumerate(tokens) if count]
    mine = mine or list(range(len(tokens)))[:1]  # a rank without fitted tokens makes forwards too
    together = batches_of_a_step(context.ranks, [tokens[index] for index in mine], batch_tokens)
    return mine[: context.config.reconstruction_steps * together], together
