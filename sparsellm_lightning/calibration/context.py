"""The parts of a run that do not change while it goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from sparsellm_lightning.architecture import DecoderLayout, device_of
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.runtime import coarse_dtype
from sparsellm_lightning.solvers import Ranks


@dataclass(frozen=True)
class Context:
    """A model, how to prune it, and the processes that do so.

    Args:
        layout: the model's blocks.
        config: settings.
        adapter: of the strategy the model runs under.
        keep_zeros: weights that are zero already are pruned first, so that the new mask contains the old one (gradual pruning).
        autocasts: whether the model's forward works under autocast, see :func:`works_under_autocast`.
    """

    layout: DecoderLayout
    config: PruningConfig
    adapter: StrategyAdapter
    keep_zeros: bool = False
    autocasts: bool = True

    @property
    def ranks(self) -> Ranks:
        """The data-parallel ranks."""
        return self.adapter.ranks

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return device_of(self.layout.model)

    @property
    def coarse_dtype(self) -> torch.dtype:
        """Dtype of products whose rounding is averaged out, see :func:`~sparsellm_lightning.runtime.coarse_dtype`."""
        return coarse_dtype(self.device, self.config.solver_precision == "float32")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype of autocast in forwards whose rounding is averaged out. None if the model or the products stay as they are."""
        stored = next(self.layout.model.parameters()).dtype
        return self.coarse_dtype if self.autocasts and stored == torch.float32 != self.coarse_dtype else None

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to :attr:`autocast_dtype`, if there is one."""
        dtype = self.autocast_dtype
        kept = not self.adapter.weights_are_split  # casts of gathered shards would add up to the whole model
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype, cache_enabled=kept)

    def coarse_forwards(self) -> AbstractContextManager[object]:
        """:meth:`autocast` for forwards of blocks that are tuned afterwards, whose steps average rounding out.

        Without tuning, and with an alternation, the model's own dtype stays.
        """
        tuned = self.config.reconstruction_steps > 0 and not self.alternating_blocks
        return self.autocast() if tuned else nullcontext()

    @property
    def alternating_blocks(self) -> set[int]:
        """Indices of the blocks whose feed-forward network the alternation solves. Empty at sparsity 0."""
        if self.config.requested_sparsity == 0:
            return set()
        return self.config.alternates_in(len(self.layout.blocks))


@torch.no_grad()
def works_under_autocast(context: Context) -> bool:
    """Whether a forward works with the dtype of autocast. DBRX adds bfloat16 to float32, which torch refuses.

    All ranks call this together. True if nothing would be cast.
    """
    if context.autocast_dtype is None:
        return True
    ids = torch.zeros(1, 16, dtype=torch.long, device=context.device)
    try:
        with context.autocast():
            context.adapter.run_model(context.layout.model, {"input_ids": ids})
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True
