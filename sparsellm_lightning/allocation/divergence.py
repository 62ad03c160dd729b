"""How far a changed model's next-token distribution is from the dense model's, on a few tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block, Projection
from sparsellm_lightning.calibration import Context, capture, run_block, tail_logits
from sparsellm_lightning.data import CalibrationBatch, first_tokens
from sparsellm_lightning.distributed import local_tensor
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import VocabularySample, can_sample, likely_tokens
from sparsellm_lightning.solvers import kl_divergence

OUTPUT_TOKENS = 512  # tokens, over all ranks, on which the model's output is compared
OUTPUT_LENGTH = 128  # of these, in each window


@contextmanager
def restoring(context: Context, projections: Iterable[Projection]) -> Iterator[None]:
    """Weights and biases that are changed inside are put back at the end. All ranks enter together.

    On one rank also after an exception, so that another run finds the dense model. With several ranks an exception restores
    nothing, because the other ranks would not take part.
    """
    before = [(p, context.adapter.read_rows(p).to(p.parameter.dtype).cpu()) for p in projections]
    shared = {id(p.bias): local_tensor(p.bias) for p, _ in before if p.bias is not None}  # by the experts of a block
    biases = [(bias, bias.clone()) for bias in shared.values()]
    failed = True
    try:
        yield
        failed = False
    finally:
        if not failed or context.ranks.size == 1:
            for p, rows in before:
                context.adapter.write_rows(p, rows.to(context.device))
            for bias, values in biases:
                bias.copy_(values)


class OutputProbe:
    """A few tokens on which the model's output is compared with the dense model's.

    Of a large vocabulary, a sample stands for all (:class:`~sparsellm_lightning.models.VocabularySample`).

    Args:
        context: of the run. The model is dense.
        batches: this rank's calibration windows, of which the first tokens are taken, at most one batch a rank.

    Raises:
        UserError: a model whose hidden states give no next-token distributions.
    """

    def __init__(self, context: Context, batches: Sequence[CalibrationBatch]) -> None:
        why = context.layout.why_not_predicting
        if why is not None:
            raise UserError(
                f"allocation kl and kl_blocks, pattern blocks and budgets compare next-token distributions, but "
                f"{type(context.layout.model).__name__} {why}. Use another allocation or pattern."
            )
        self.context = context
        few = first_tokens(batches, OUTPUT_TOKENS, OUTPUT_LENGTH, context.ranks)
        self.cache = capture(context, few, 0)
        self._start = self.cache.copy()
        ends = self._ends(0)
        self._sample = self._choose_sample(ends)
        self.dense = list(self._logits(ends))

    def divergence(self, block: Block, without: Collection[int] = ()) -> float:
        """Mean KL divergence over all ranks' valid tokens, with the blocks from ``block`` on as they are now.

        Args:
            block: in front of which the tokens are.
            without: indices of blocks that pass hidden states through.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        logits = self._logits(self._ends(block.index, without))
        for now, dense, valid in zip(logits, self.dense, self.cache.valid, strict=True):
            assert valid is not None
            divergence = kl_divergence(dense, now)[valid.flatten().to(total.device)]
            total += torch.stack([divergence.sum(dtype=torch.float64), total.new_tensor(len(divergence))])
        self.context.ranks.sum_(total)
        return max(float(total[0] / total[1]), 0.0)

    def advance(self, block: Block) -> None:
        """Move the tokens behind a block."""
        with self.context.autocast():
            self.cache.hidden = run_block(self.context, block, self.cache)

    def rewind(self) -> None:
        """Move the tokens in front of the first block."""
        self.cache = self._start.copy()

    def _ends(self, first: int, without: Collection[int] = ()) -> list[Tensor]:
        """Hidden states behind the last block. The cache is in front of block ``first``."""
        moving = self.cache.copy()
        with self.context.autocast():
            for block in self.context.layout.blocks[first:]:
                if block.index in without:
                    continue
                moving.hidden = run_block(self.context, block, moving)
        return moving.hidden

    def _choose_sample(self, ends: list[Tensor]) -> VocabularySample | None:
        """A sample of the vocabulary, the same for any number of ranks. None if the model must compute all logits together."""
        model, ranks = self.context.layout.model, self.context.ranks
        if self.context.adapter.forward_is_collective:
            return None
        windows = [window for hidden in ends for window in hidden.split(1)]  # logits of one window at a time
        able = not windows or can_sample(model, lambda: self._tail(windows[0][:, :1]))  # a rank may have no windows
        if not ranks.largest(len(windows)) or not ranks.all(able):
            return None
        head: Any = model.get_output_embeddings()
        likely = torch.zeros(len(head.weight), dtype=torch.long, device=self.context.device)
        for window in windows:
            likely += likely_tokens(self._tail(window))
        ranks.sum_(likely)
        return VocabularySample.draw(likely > 0, torch.Generator().manual_seed(self.context.config.seed))

    def _logits(self, ends: list[Tensor]) -> Iterator[Tensor]:
        """(tokens, vocabulary) of each batch. Of a sample, with its weights."""
        sample = self._sample
        for hidden in ends:  # one call a batch, because ranks have equally many batches but not windows
            with nullcontext() if sample is None else sample.in_head(self.context.layout.model):
                logits = self._tail(hidden).flatten(0, 1)
            yield logits if sample is None else logits + sample.log_weights

    def _tail(self, hidden: Tensor) -> Tensor:
        with self.context.autocast():
            return tail_logits(self.context, hidden.to(self.context.device))
