"""Distillation: all kept weights of the pruned model, tuned together on the dense model's next-token distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import Context
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import Forward, decoder_output, logits_at, positions_together
from sparsellm_lightning.pipeline.kept import KeptParameters
from sparsellm_lightning.solvers import count

LEARNING_RATE = 1e-3  # largest one, in units of each parameter's scale
STEP_TOKENS = 2048  # tokens of a step, over all ranks
MAX_CHECKS = 4  # of the held-out divergence, besides the one before


class Distiller:
    """Tunes all blocks of a pruned model together.

    Minimises over the kept weights, norms and biases of the blocks, with the mask fixed, by Adam, the mean over fitted tokens
    of

        KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)

    where p and q are the next-token distributions of the dense and the pruned model. The dense model's decoder output is kept,
    a vector a token on the host, from which p is computed again. Logits of a few positions at a time are in memory.

    It is made while the model is dense. All ranks call its methods together.

    Args:
        context: of the run.
        batches: this rank's calibration windows.
        fitted: number of windows that are fitted: the first ones. The best state is chosen on the others.

    Raises:
        UserError: a model without a language-model head, or whose forward does not call its decoder once.
    """

    def __init__(self, context: Context, batches: Sequence[CalibrationBatch], fitted: int) -> None:
        self.context, self.batches = context, batches
        self.autocast_dtype = context.autocast_dtype
        self.model, self.ranks, self.adapter = context.layout.model, context.ranks, context.adapter
        if self.model.get_output_embeddings() is None:
            raise UserError(
                f"distillation_steps compare next-token distributions, but {type(self.model).__name__} has no language-model "
                "head. Set distillation_steps to 0."
            )
        self._output: Any = None  # of the decoder: the form in which other hidden states are put
        self.fitted: list[int] = []  # windows of each batch that are fitted
        for batch in batches:
            self.fitted.append(min(max(fitted, 0), batch.windows))
            fitted -= batch.windows
        with torch.no_grad():
            self.goals = [self._decode(batch).last_hidden_state.cpu() for batch in batches]

    @torch.no_grad()
    def tune(self, steps: int) -> dict[str, Any]:
        """Tune the model in place, and keep the best of the checked states.

        Returns:
            ``steps`` that were kept, and the mean divergences on held-out windows before and after; on the fitted ones if none
            are held out.
        """
        blocks = [block for block in self.context.layout.blocks if self._has_weights(block)]
        parameters = KeptParameters(self.context, blocks, LEARNING_RATE, steps)
        best, best_step, before = parameters.state(), 0, self.divergence()
        least, checks = before, min(MAX_CHECKS, steps)
        with parameters.trainable([self.model]):
            for step, chosen in zip(range(steps), self._choices(), strict=False):
                self._add_gradients(chosen)
                parameters.step()
                if (step + 1) * checks // steps > step * checks // steps:
                    divergence = self.divergence()
                    if divergence < least:  # False for NaN
                        least, best_step, best = divergence, step + 1, parameters.state()
        parameters.restore(best)
        return {"steps": best_step, "divergence": [before, least]}

    def divergence(self) -> float:
        """Mean divergence over all ranks' held-out tokens. Over the fitted ones if none are held out."""
        held_out = self.ranks.total(sum(b.windows - f for b, f in zip(self.batches, self.fitted, strict=True))) != [0]
        totals = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for index, fitted in enumerate(self.fitted):
            rows = slice(fitted, None) if held_out else slice(fitted)
            used = len(range(*rows.indices(self.batches[index].windows)))
            if used or self.adapter.forward_is_collective:
                for part in self._divergences(index):
                    totals[0] += part[rows].sum()
                totals[1] += self._valid(index)[rows].sum()
        self.ranks.sum_(totals)
        return float(totals[0] / totals[1])

    def _add_gradients(self, chosen: Sequence[int]) -> None:
        """Add the gradient of the mean divergence, over all ranks, of this rank's fitted tokens in these batches."""
        (tokens,) = self.ranks.total(sum(int(self._valid(index)[: self.fitted[index]].sum()) for index in chosen))
        scale = (self.ranks.size if self.adapter.weights_are_split else 1) / max(tokens, 1)
        for index in chosen:
            with torch.enable_grad():
                for part in self._divergences(index):
                    (part[: self.fitted[index]].sum() * scale).backward()
            self._count(self.batches[index])

    def _count(self, batch: CalibrationBatch) -> None:
        """Forward and backward of the blocks, which has two products for each of the forward's, and of the head, for p too."""
        head: Any = self.model.get_output_embeddings()
        blocks = sum(block.forward_work(batch.length) for block in self.context.layout.blocks)
        tokens = batch.windows * batch.length
        count(tokens * (3 * blocks + 6 * head.weight.numel()), self.autocast_dtype or torch.float32)

    def _divergences(self, index: int) -> Iterator[Tensor]:
        """Divergences of the tokens of a batch, (windows, positions), a few positions at a time. 0 for padding.

        After the caller has taken the gradient of every part, this takes that of the decoder. Sharded weights need one whole
        forward and backward instead.
        """
        batch, goal = self.batches[index], self.goals[index].to(self.context.device)
        forward, valid = partial(self.adapter.logits, self.model, batch.inputs), self._valid(index)
        if self.adapter.forward_is_collective:
            dense = self._log_probabilities(forward, goal)
            with self._autocast():
                logits = forward()
            assert logits is not None
            yield _divergence(dense, torch.log_softmax(logits.float(), -1)) * valid
            return
        hidden = self._decode(batch).last_hidden_state
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        for positions in positions_together(self.model, batch.windows, batch.length):
            with torch.no_grad():
                dense = self._log_probabilities(forward, goal[:, positions])
            yield _divergence(dense, self._log_probabilities(forward, leaf[:, positions])) * valid[:, positions]
        if hidden.requires_grad:
            hidden.backward(leaf.grad)

    def _log_probabilities(self, forward: Forward, hidden: Tensor) -> Tensor:
        """Of the next token, for the decoder's output at some positions."""
        with self._autocast():
            logits = logits_at(self.model, forward, self._output, hidden)
        assert logits is not None  # every batch has windows
        return torch.log_softmax(logits.float(), -1)

    def _decode(self, batch: CalibrationBatch) -> Any:
        forward = partial(self.adapter.logits, self.model, batch.inputs)
        with self._autocast():
            output = decoder_output(self.model, forward, (batch.windows, batch.length))
        if output is None:
            raise UserError(
                f"distillation_steps need a model whose forward calls its decoder once, but {type(self.model).__name__} does "
                "not. Set distillation_steps to 0."
            )
        self._output = self._output or output
        return output

    def _choices(self) -> Iterator[list[int]]:
        """Batch indices of this rank for each step: every fitted batch once, in random order, then again."""
        tokens = [int(self._valid(index)[:fitted].sum()) for index, fitted in enumerate(self.fitted)]
        mine = [index for index, count in enumerate(tokens) if count]
        if self.adapter.forward_is_collective:
            mine = mine or [0]
        shapes = self.ranks.gather_counts(max(tokens, default=0), len(mine))
        largest, numbers = zip(*shapes, strict=True)
        together = min(max(1, round(STEP_TOKENS / max(sum(largest), 1))), max(numbers))
        generator = torch.Generator().manual_seed(self.context.config.seed)
        queue: list[int] = []
        while True:
            while mine and len(queue) < together:
                queue += [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
            chosen, queue = queue[:together], queue[together:]
            yield chosen

    def _has_weights(self, block: Block) -> bool:
        """False for a block that was left out, which must go on passing hidden states through."""
        projections = list(block.projections())
        (zeros,) = self.ranks.total(sum(int(self.adapter.count_zeros(p)) for p in projections))
        return zeros < sum(p.size for p in projections)

    def _valid(self, index: int) -> Tensor:
        """Whether the tokens of a batch count, (windows, length)."""
        batch = self.batches[index]
        if batch.valid is None:
            return torch.ones(batch.windows, batch.length, dtype=torch.bool, device=self.context.device)
        return batch.valid.to(self.context.device)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.context.device.type, dtype)


def _divergence(dense: Tensor, found: Tensor) -> Tensor:
    """``Σ_v p_v (log p_v − log q_v)`` of each token, from log-probabilities."""
    return (dense.exp() * (dense - found)).sum(-1)
