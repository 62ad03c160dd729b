"""Random calibration batches with padding."""

from __future__ import annotations

import torch
from torch import Tensor

from support.models import VOCABULARY


def random_batches(windows: int = 8, length: int = 32) -> list[dict[str, Tensor]]:
    """Batches of three windows. The first window begins with 10 padded tokens, the fourth ends with ``length - 20``."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    mask[3, 20:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(3), mask.split(3), strict=True)]
