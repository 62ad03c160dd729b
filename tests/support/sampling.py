"""Sampling from a distribution, as the reference that written windows are compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def draw(chances: Any, generator: torch.Generator) -> int:
    """An index, in proportion to chances (n,), float64: the Gumbel trick over groups of about √n neighbours, then in one."""
    width = math.ceil(math.sqrt(len(chances)))
    groups = [chances[start : start + width] for start in range(0, len(chances), width)]
    group = _largest([float(part.sum()) for part in groups], width, generator)
    return group * width + _largest(groups[group], width, generator)


def _largest(chances: Any, drawn: int, generator: torch.Generator) -> int:
    exponential = -np.log(torch.empty(drawn, dtype=torch.float64).uniform_(generator=generator).numpy())
    with np.errstate(divide="ignore"):
        return int(np.argmax(np.log(chances) - np.log(exponential)[: len(chances)]))
