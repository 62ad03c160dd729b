"""The arithmetic of matrix products: float32 at full speed, and whether bfloat16 is worth its rounding.

Both choices follow from the processor's capabilities, never from a timing, so that a resumed run makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


@contextmanager
def fastest_float32(device: torch.device) -> Iterator[None]:
    """Context with the fastest float32 products that keep float32's accuracy.

    A coarser precision that was set outside, such as TF32, is switched off inside. On a CPU torch gives float32 products to MKL
    by default, which reaches about half of oneDNN's speed on AMD processors, and to oneDNN under matmul precision ``medium``.
    Where oneDNN has no kernels of reduced precision, it still computes in float32: there ``medium`` is used.
    """
    with _matmul_precision("medium" if device.type == "cpu" and _medium_is_exact() else "highest"):
        yield


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision``, and afterwards what was set before, by this function or for each library."""
    libraries: list[Any] = []
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set in torch.backends
        before, libraries = "", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    own = [library.fp32_precision for library in libraries]
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if before:
            torch.set_float32_matmul_precision(before)
        for library, value in zip(libraries, own, strict=True):
            library.fp32_precision = value


@cache
def _medium_is_exact() -> bool:
    """Whether float32 products keep float32's accuracy under torch's matmul precision ``medium``."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    with _matmul_precision("medium"):
        product = a @ b
    exact = a.double() @ b.double()
    return bool((product - exact).norm() < 2e-6 * exact.norm())


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """Dtype in which a layer multiplies here: that of autocast, if it is on, otherwise the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def coarse_dtype(device: torch.device, exact: bool = False) -> torch.dtype:
    """Dtype of products whose rounding is averaged out: bfloat16 where the hardware is faster at it, else float32.

    It is faster on a CUDA device's tensor cores, with a CPU's AMX tiles, and with AVX512-BF16 on AMD's CPUs. On Intel's CPUs
    AVX512-BF16 alone may be slower.

    Args:
        device: that multiplies.
        exact: always float32.
    """
    if exact:
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _cpu_is_faster_at_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_is_faster_at_bfloat16() -> bool:
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") and capabilities.get("sse4a"))  # only AMD's CPUs have SSE4a
