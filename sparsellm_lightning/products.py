"""Which library multiplies float32 matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def fastest_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices by oneDNN where that is torch's second choice though no less exact.

    torch gives float32 products to MKL, which runs at half of oneDNN's speed on AMD processors, and takes oneDNN only where
    reduced precision is allowed. On processors for which oneDNN has no reduced kernels it then computes in float32 all the
    same (measured here: 480 against 216 GFLOP/s, relative error 4e-7). Where it would really round, nothing is changed.
    """
    if device.type != "cpu" or not _is_float32_all_the_same():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _is_float32_all_the_same() -> bool:
    """Whether a product with reduced precision allowed is as exact as float32 is."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        product = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return bool((product - exact).norm() < 2e-6 * exact.norm())
