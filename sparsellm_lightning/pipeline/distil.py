"""Distillation: all kept weights of the pruned model, tuned together on the dense model's next-token distributions."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import Context
from sparsellm_lightning.data import CalibrationBatch, equally_many, regrouped, split_windows
from sparsellm_lightning.distributed import ranks_on_this_host
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import (
    Forward,
    VocabularySample,
    can_sample,
    decoder_output,
    head_in,
    likely_tokens,
    logits_at,
    positions_together,
)
from sparsellm_lightning.pipeline.kept import (
    STEP_TOKENS,
    KeptParameters,
    activations_of_tuning,
    batches_of_a_step,
    in_random_order,
    memory_of_tuning,
)
from sparsellm_lightning.runtime import format_bytes, return_free_memory, room, tracked
from sparsellm_lightning.solvers import count, kl_divergence

LEARNING_RATE = 5e-4  # largest one, in units of each parameter's scale
OWN_SHARE = 0.6  # of the steps, on the calibration windows, if there are written ones too
MAX_CHECKS = 2  # of the held-out divergence, besides the one before, each of which takes as long as a few steps


class Distiller:
    """Tunes all blocks of a pruned model together.

    Minimises over the kept weights, norms and biases of the blocks, with the mask fixed, by Adam, the mean over fitted tokens
    of

        KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)

    where p and q are the next-token distributions of the dense and the pruned model. The dense model's decoder output, one
    vector per token, is kept on the host, and p is recomputed from it. Logits of a few positions at a time are in memory. If
    the vocabulary is large, steps sum over a sample of it (:class:`~sparsellm_lightning.models.VocabularySample`), drawn anew
    for each batch. The divergence that chooses the best state sums over the whole vocabulary.

    Steps on windows that the model has written come first, and those on the calibration windows at the end, when the rate
    falls (see recipes/RESULTS.md, Order of the steps).

    It is made while the model is dense. All ranks call its methods together.

    Args:
        context: of the run.
        batches: this rank's calibration windows.
        fitted: number of these that are fitted: the first ones. The best state is chosen on the others.
        written: windows of this rank that the model has written, which are fitted too.

    Attributes:
        kept: ``steps`` that are in the model, and the mean ``divergence`` on held-out windows before and after; on the fitted
            ones if none are held out. Empty before the first check.

    Raises:
        UserError: a model without a language-model head, or whose forward does not call its decoder once; or no room for the
            gradients or Adam's moments.
    """

    @torch.no_grad()
    def __init__(
        self,
        context: Context,
        batches: Sequence[CalibrationBatch],
        fitted: int,
        written: Sequence[CalibrationBatch] = (),
    ) -> None:
        self.context = context
        self.autocast_dtype = context.autocast_dtype
        self.head_dtype = None if context.adapter.weights_are_split else context.autocast_dtype  # see head_in
        self.kept: dict[str, Any] = {}
        self.model, self.ranks, self.adapter = context.layout.model, context.ranks, context.adapter
        if self.model.get_output_embeddings() is None:
            raise UserError(
                f"distillation_steps compare next-token distributions, but {type(self.model).__name__} has no language-model "
                "head. Set distillation_steps to 0."
            )
        made = [self._steps(part) for part in (*split_windows(batches, fitted), written)]
        self._check_room([batch for part in made for batch in part])
        self._output: Any = None  # of the decoder: the form in which other hidden states are put
        first = next((batch for part in made for batch in part), None)
        if not self.ranks.all(first is None or self._decode(first) is not None):
            raise UserError(
                f"distillation_steps need a model whose forward calls its decoder once, but {type(self.model).__name__} does "
                "not. Set distillation_steps to 0."
            )
        own, held_out, by_model = made
        fitted_batches = own + by_model
        steps = context.config.distillation_steps
        before = round((1 - OWN_SHARE) * steps * self._share_written(written, fitted))
        self.schedule = [
            *islice(self._choices(fitted_batches, range(len(own), len(fitted_batches))), before),
            *islice(self._choices(fitted_batches, range(len(own))), steps - before),
        ]
        seen = sorted({index for chosen in self.schedule for index in chosen})
        with head_in(self.model, self.head_dtype):
            self.fitted = {index: self._with_goal(fitted_batches[index]) for index in seen}
            self.held_out = [self._with_goal(batch) for batch in held_out]
            can_sample = self._can_sample()
            self.likely = {index: self._likely(*self.fitted[index]) for index in seen} if can_sample else {}
        self._generator = torch.Generator().manual_seed(context.config.seed)

    @torch.no_grad()
    def tune(self) -> dict[str, Any]:
        """Tune the model in place for ``distillation_steps``, and keep the best of the checked states, also if it fails.

        Returns:
            :attr:`kept`.
        """
        steps = len(self.schedule)
        self.adapter.finish(self.model)  # flags that are set on gathered parameters would be lost
        blocks = [block for block in self.context.layout.blocks if self._has_weights(block)]
        parameters = KeptParameters(self.context, blocks, LEARNING_RATE, steps, self.storage)
        best, checks = parameters.state(), min(MAX_CHECKS, steps)
        try:
            # Samples of a large vocabulary are small. The rounded copy of its whole head is not.
            with head_in(self.model, None if self.likely else self.head_dtype), parameters.trainable([self.model]):
                before = least = self.divergence()
                self.kept = {"steps": 0, "divergence": [before, least]}
                for step, chosen in enumerate(tracked(self.schedule, "Distilling", "step")):
                    self._add_gradients(parameters, chosen)
                    parameters.step()
                    if (step + 1) * checks // steps > step * checks // steps:
                        divergence = self.divergence()
                        if divergence < least:  # False for NaN
                            least = divergence
                            parameters.update(best)
                            self.kept = {"steps": step + 1, "divergence": [before, least]}
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold a step's tensors
            raise
        finally:
            parameters.restore(best)
        return self.kept

    def divergence(self) -> float:
        """Mean divergence over all ranks' held-out tokens. Over those that steps see if none are held out."""
        (held_out,) = self.ranks.total(sum(batch.tokens for batch, _ in self.held_out))
        totals = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        return_free_memory()  # a step's activations and the rounded head of a check do not fit into each other's place
        with head_in(self.model, self.head_dtype):
            for batch, goal in self.held_out if held_out else self.fitted.values():
                totals[0] += sum(part.sum() for part in self._divergences(batch, goal))
                totals[1] += batch.tokens
        return_free_memory()
        self.ranks.sum_(totals)
        return float(totals[0] / totals[1])

    def _check_room(self, batches: Sequence[CalibrationBatch]) -> None:
        """Choose where the vectors of kept entries lie. Gradients of parameters and activations lie on the device."""
        context, split = self.context, self.adapter.weights_are_split
        gradients, vectors = memory_of_tuning(context.layout.blocks, context.config, split)
        gradients += max(
            (activations_of_tuning(context.layout, b.windows, b.length, self.autocast_dtype) for b in batches),
            default=0.0,
        )
        device, limit = context.device, room(context.config.memory, context.device)
        host, sharing = torch.device("cpu"), ranks_on_this_host(self.ranks)
        needed, what = gradients, "gradients and activations"
        if device == host:
            needed, what = gradients + vectors, "gradients, activations and Adam's moments"
            limit = limit / sharing if context.config.memory == "auto" else limit
        if not self.ranks.all(needed <= limit):
            raise UserError(
                f"distillation_steps need {format_bytes(needed)} besides the model, for {what}, and there are "
                f"{format_bytes(limit)}. Set distillation_steps to 0, raise memory, or shard the model (FSDP)."
            )
        fits = self.ranks.all(gradients + vectors <= limit)
        if not fits and not self.ranks.all(vectors * sharing <= room("auto", host)):
            raise UserError(
                f"distillation_steps need {format_bytes(vectors)} for Adam's moments, for which neither device nor host has "
                "room. Set distillation_steps to 0, or shard the model over more ranks (FSDP)."
            )
        self.storage = device if fits else host

    def _add_gradients(self, parameters: KeptParameters, chosen: Sequence[int]) -> None:
        """Add the gradient of the mean divergence, over all ranks, of this rank's tokens in these fitted batches."""
        (tokens,) = self.ranks.total(sum(self.fitted[index][0].tokens for index in chosen))
        scale = parameters.loss_scale(tokens)
        for index in chosen:
            sample = VocabularySample.draw(self.likely[index], self._generator) if self.likely else None
            with torch.enable_grad(), nullcontext() if sample is None else sample.in_head(self.model):
                for part in self._divergences(*self.fitted[index], sample):
                    (part.sum() * scale).backward()
            parameters.collect()
            self._count(self.fitted[index][0], sample)

    def _steps(self, batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
        """The windows in batches of a step's tokens. Where a forward is collective, equally many on all ranks."""
        made = regrouped(batches, STEP_TOKENS // self.ranks.size)
        return equally_many(made, self.ranks, self.context.device) if self.adapter.forward_is_collective else made

    def _share_written(self, written: Sequence[CalibrationBatch], fitted: int) -> float:
        """How many of the written windows that were asked for there are."""
        found, wanted = self.ranks.total(len(written), self.context.config.continuations * fitted)
        return min(found / max(wanted, 1), 1.0)

    def _with_goal(self, batch: CalibrationBatch) -> tuple[CalibrationBatch, Tensor]:
        """A batch and the dense model's decoder output for it, on the host, as autocast rounds it in front of the head."""
        return batch, self._decode(batch).last_hidden_state.to("cpu", self.autocast_dtype)

    def _can_sample(self) -> bool:
        """Whether steps can take a sample of the vocabulary."""
        if self.adapter.forward_is_collective or not self.fitted:
            return False
        batch, goal = next(iter(self.fitted.values()))
        hidden = goal[:, :1].to(self.context.device)
        return can_sample(self.model, lambda: self._logits(self._forward_of(batch), hidden))

    def _likely(self, batch: CalibrationBatch, goal: Tensor) -> Tensor:
        """Whether a token of the vocabulary is likely after one of the batch's, for the dense model."""
        forward = self._forward_of(batch)
        found = [
            likely_tokens(self._logits(forward, goal[:, positions].to(self.context.device)))
            for positions in positions_together(self.model, batch.windows, batch.length)
        ]
        return torch.stack(found).any(0)

    def _count(self, batch: CalibrationBatch, sample: VocabularySample | None) -> None:
        """Forward and backward of the blocks, which has two products for each of the forward's, and of the head, for p too."""
        head: Any = self.model.get_output_embeddings()
        share = 1.0 if sample is None else len(sample.tokens) / len(head.weight)
        blocks = sum(block.forward_work(batch.length) for block in self.context.layout.blocks)
        tokens = batch.windows * batch.length
        count(tokens * (3 * blocks + 6 * share * head.weight.numel()), self.autocast_dtype or self.model.dtype)

    def _divergences(
        self, batch: CalibrationBatch, goal: Tensor, sample: VocabularySample | None = None
    ) -> Iterator[Tensor]:
        """Divergences of the tokens of a batch, (windows, positions), a few positions at a time. 0 for padding.

        ``sample``: the part of the vocabulary that the head currently computes. None: the whole vocabulary.

        With gradients, the caller runs the backward of every part, down to the decoder's output. Then this generator runs the
        backward of the decoder. If a forward is collective (sharded weights), there is one part, whose backward covers both.
        """
        goal, valid, forward = goal.to(self.context.device), batch.counts(), self._forward_of(batch)
        if self.adapter.forward_is_collective:
            dense = self._logits(forward, goal)
            with self.context.autocast():
                logits = forward()
            assert logits is not None
            yield _divergences(dense, logits) * valid
            return
        vocabulary = None if sample is None else len(sample.tokens)
        hidden = self._decode(batch).last_hidden_state
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        for positions in positions_together(self.model, batch.windows, batch.length, vocabulary):
            with torch.no_grad():
                dense = self._logits(forward, goal[:, positions])
            logits = self._logits(forward, leaf[:, positions])
            if sample is not None:
                dense, logits = dense + sample.log_weights, logits + sample.log_weights
            yield _divergences(dense, logits) * valid[:, positions]
        if hidden.requires_grad:
            hidden.backward(leaf.grad)

    def _logits(self, forward: Forward, hidden: Tensor) -> Tensor:
        """Next-token logits for the decoder's output at some positions."""
        with self.context.autocast():
            logits = logits_at(self.model, forward, self._output, hidden)
        assert logits is not None  # every batch has windows
        return logits

    def _decode(self, batch: CalibrationBatch) -> Any:
        with self.context.autocast():
            output = decoder_output(self.model, self._forward_of(batch), (batch.windows, batch.length))
        self._output = self._output or output
        return output

    def _forward_of(self, batch: CalibrationBatch) -> Forward:
        return partial(self.adapter.logits, self.model, batch.inputs)

    def _choices(self, batches: Sequence[CalibrationBatch], mine: Sequence[int]) -> Iterator[list[int]]:
        """Endless iterator over steps: indices into ``batches``, out of ``mine``. Each round visits all, in random order."""
        together = batches_of_a_step(self.ranks, [batches[index].tokens for index in mine], STEP_TOKENS)
        return in_random_order(mine, together, torch.Generator().manual_seed(self.context.config.seed))

    def _has_weights(self, block: Block) -> bool:
        """False for a block that was left out, which must go on passing hidden states through."""
        projections = list(block.projections())
        (zeros,) = self.ranks.total(sum(int(self.adapter.count_zeros(p)) for p in projections))
        return zeros < sum(p.size for p in projections)


def _divergences(dense: Tensor, logits: Tensor) -> Tensor:
    """KL divergence per position, (windows, positions), of logits (windows, positions, vocabulary). Overwrites ``dense``."""
    return kl_divergence(dense.flatten(0, 1), logits.flatten(0, 1), reuse=True).view(logits.shape[:2])
