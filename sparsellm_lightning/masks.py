"""Keeping pruned weights at zero while training goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsellm_lightning.architectures import DecoderLayout


class Masks:
    """Zeros of a pruned model's projections, re-applied after optimizer steps.

    The mask of a parameter is where its local tensor is non-zero when the object is made: nothing is gathered, and a
    resumed run rebuilds it from the weights alone.
    """

    def __init__(self, layout: DecoderLayout) -> None:
        self._pruned: list[tuple[Tensor, Tensor]] = []
        for projection in layout.projections():
            if projection.pruned:
                local = local_tensor(projection.parameter)
                self._pruned.append((local, local == 0))

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero again."""
        for weight, zero in self._pruned:
            weight.masked_fill_(zero, 0)


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, sharing its memory; the whole of one that is not distributed."""
    data = parameter.detach()
    to_local = getattr(data, "to_local", None)
    return data if to_local is None else to_local()
