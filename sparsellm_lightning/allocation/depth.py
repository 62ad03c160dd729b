"""Which decoder blocks a model can do without."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsellm_lightning.allocation.divergence import OutputProbe, restoring
from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import ActivationCache, Context, run_block
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.distributed import local_tensor
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.runtime import tracked


def choose_blocks(
    context: Context, cache: ActivationCache, batches: Sequence[CalibrationBatch], number: int
) -> dict[int, float]:
    """Blocks to leave out, in order of choice: index -> divergence of the model without this and all blocks chosen before it.

    Greedy: each step adds the block whose removal, with those chosen before, makes the model's next-token distribution
    diverge least from the dense model's, in KL. The number of forwards grows with the square of the number of blocks.

    Args:
        context: of the run. The model is dense.
        cache: activations in front of the first block.
        batches: this rank's calibration windows, those of the cache.
        number: of blocks to leave out.

    Raises:
        UserError: a block that changes hidden states even if its projections are 0; see also :class:`OutputProbe`.
    """
    blocks = context.layout.blocks
    probe = OutputProbe(context, batches)
    _check_residual(context, cache.part(range(min(len(cache.hidden), 1))))
    removed: dict[int, float] = {}
    for _ in tracked(range(number), "Choosing blocks", "block"):
        divergences: dict[int, float] = {}
        for block in blocks:
            if block.index not in removed:
                divergences[block.index] = probe.divergence(block, {*removed, block.index})
                probe.advance(block)
        probe.rewind()
        best = min(divergences, key=lambda index: (math.isnan(divergences[index]), divergences[index]))  # NaN: overflow
        removed[best] = divergences[best]
    return removed


def leave_out(context: Context, block: Block) -> None:
    """Set a block's projections and their biases to zero, so that it passes hidden states through. All ranks do it together."""
    for p in block.projections():
        context.adapter.write_rows(p, torch.zeros_like(context.adapter.read_rows(p)))
        if p.bias is not None:
            local_tensor(p.bias).zero_()


def _check_residual(context: Context, sample: ActivationCache) -> None:
    """Refuse blocks that are more than a sum of the hidden states and what projections give. Weights are restored."""
    for block in context.layout.blocks:
        with restoring(context, block.projections()):
            leave_out(context, block)
            outputs = run_block(context, block, sample)
        changed = sum(not torch.equal(out, given) for out, given in zip(outputs, sample.hidden, strict=True))
        if context.ranks.total(changed) != [0]:
            raise UserError(
                f"Pattern blocks needs blocks that add to their hidden states, but {block.name} changes them even if all its "
                "projections are zero (a norm behind the sum, or a layer that is not pruned). Use another pattern."
            )
