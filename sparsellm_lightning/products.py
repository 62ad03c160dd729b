"""How to multiply matrices fast: float32 ones as exactly as ever, others with a coarser type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from sparsellm_lightning.stopwatch import gemm_peak

WORTH_ROUNDING = 1.2  # times as fast, at least: where it makes little difference, noise must not decide


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


def coarse_dtype(device: torch.device, exact: bool = False) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, otherwise, or where it must be ``exact``, float32.

    A CPU is measured, once a process: one that has bfloat16 instructions may still run them at half the speed of float32
    (a Xeon with AVX512-BF16 but without AMX, measured here: 160 against 310 GFLOP/s).
    """
    if exact or device.type not in ("cpu", "cuda"):
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _has_bfloat16() and _gain_of_bfloat16() > WORTH_ROUNDING
    return torch.bfloat16 if fast else torch.float32


def _has_bfloat16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


@cache
def _gain_of_bfloat16() -> float:
    device = torch.device("cpu")
    with fastest_float32(device):
        # In turn, so that what else the machine does slows both.
        peaks = [gemm_peak(device, dtype, 512, 0.02) for _ in range(4) for dtype in (torch.float32, torch.bfloat16)]
    return max(peaks[1::2]) / max(peaks[::2])
