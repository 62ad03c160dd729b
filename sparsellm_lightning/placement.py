"""Where the activations of a block's calibration tokens are kept: on the device, in host memory, or nowhere.

Statistics and factorisations have a size that the model gives. What grows with the calibration set are the block's inputs and
outputs, 4 d numbers a token, and inside the alternation its auxiliaries and predictions, 2 f each (f where not gated).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.config import AutoOrNumber
from sparsellm_lightning.errors import OutOfMemoryError, UserError

_AUTO_FRACTION = 0.8  # of what is free: the rest is for temporaries and fragmentation


@dataclass(frozen=True)
class Sizes:
    """Bytes of what pruning one block holds on a rank, besides the model.

    Args:
        work: the feed-forward block's weights in float32, its statistics and their factorisations.
        inputs: the block's inputs and outputs, and those of its feed-forward part.
        auxiliaries: z and s of the alternation; 0 without one.
        predictions: what the weights predict for z and s.
        hidden: the hidden activation that the down projection sees, of use to the local solver alone.
    """

    work: int
    inputs: int
    auxiliaries: int
    predictions: int
    hidden: int

    @classmethod
    def of_block(
        cls,
        tokens: int,
        dim: int,
        width: int,
        *,
        gated: bool,
        auxiliary_tokens: int,
        streams: int,
        itemsize: int,
        auxiliary_itemsize: int,
    ) -> Sizes:
        """For a feed-forward block of ``dim`` inputs and ``width`` hidden features, and ``tokens`` calibration tokens.

        Args:
            auxiliary_tokens: those of them that carry auxiliaries; 0 without an alternation.
            streams: token-wise (tokens, dim) tensors held.
            itemsize, auxiliary_itemsize: bytes of a number of the model's activations, and of an auxiliary.
        """
        matrices = 3 if gated else 2
        auxiliaries = (matrices - 1) * auxiliary_tokens * width * auxiliary_itemsize
        return cls(
            # Float32: dense, best, current and rounded weights, targets. Gram matrices: float64 sum, damped copy and factor,
            # and in float32 the mean, the best iterate's, and factors.
            work=5 * 4 * matrices * dim * width + (44 if auxiliary_tokens else 36) * width * width,
            inputs=streams * tokens * dim * itemsize,
            auxiliaries=auxiliaries,
            predictions=auxiliaries,
            hidden=0 if auxiliary_tokens else tokens * width * itemsize,
        )

    def describe(self) -> str:
        parts = [f"{name} {format_bytes(size)}" for name, size in vars(self).items() if size]
        return ", ".join(parts)


@dataclass(frozen=True)
class Placement:
    """What is kept where; anything else is computed again when it is needed, with the same result.

    Args:
        inputs, auxiliaries: device of the block's inputs and outputs, and of z and s.
        predictions, hidden: whether they are kept, on the device.
    """

    inputs: torch.device
    auxiliaries: torch.device
    predictions: bool = True
    hidden: bool = True

    @classmethod
    def everything_on(cls, device: torch.device) -> Placement:
        return cls(device, device)


def place(budget: AutoOrNumber, sizes: Sizes, device: torch.device) -> Placement:
    """The fastest placement within a budget: first predictions or the hidden activation are given up, then auxiliaries and the
    inputs move to pinned host memory (on a CPU there is no other memory to move to).

    Args:
        budget: bytes on the device besides the model, or ``auto``: most of what is free now.
        sizes: of the largest block.
        device: that computes.

    Raises:
        UserError: not even the least placement fits the bytes asked for.
    """
    limit = _available(device) if budget == "auto" else budget
    host = torch.device("cpu")
    on_device = sizes.work + sizes.inputs + sizes.auxiliaries
    if on_device <= limit:
        # Where one of them is not zero the other is.
        kept = on_device + sizes.predictions + sizes.hidden <= limit
        return Placement(device, device, kept, kept)
    least = sizes.work if device.type != "cpu" else on_device
    if budget != "auto" and least > limit:
        raise UserError(
            f"memory must be at least {format_bytes(least)} for the largest block ({sizes.describe()}), got "
            f"{format_bytes(limit)}. Raise it, or lower num_calibration_samples."
        )
    keep_inputs = sizes.work + sizes.inputs <= limit
    return Placement(device if keep_inputs else host, host, predictions=False, hidden=False)


@contextmanager
def explaining_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Put an explanation behind what the allocator says when there is no room.

    Raises:
        OutOfMemoryError: instead of the accelerator's own, or of torch's RuntimeError on a CPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(f"Out of memory ({str(error).splitlines()[0][:200]}). {explain()}") from error


class Shelf:
    """Tensors by number, in buffers that are allocated once and then written again.

    Args:
        dtype: they are kept in.
        home: where they are kept.
    """

    def __init__(self, dtype: torch.dtype, home: torch.device) -> None:
        self.dtype, self.home = dtype, home
        self._tensors: dict[int, Tensor] = {}

    def put(self, index: int, tensor: Tensor) -> None:
        if index not in self._tensors:
            self._tensors[index] = empty(tensor.shape, self.dtype, self.home, tensor.device)
        self._tensors[index].copy_(tensor, non_blocking=True)

    def get(self, index: int, device: torch.device) -> Tensor:
        return self._tensors[index].to(device, non_blocking=True)

    def clear(self) -> None:
        self._tensors.clear()


def empty(shape: tuple[int, ...], dtype: torch.dtype, home: torch.device, device: torch.device) -> Tensor:
    """An uninitialised tensor on ``home``, pinned where ``device`` is an accelerator that reads it over the bus."""
    return torch.empty(shape, dtype=dtype, device=home, pin_memory=home.type == "cpu" and device.type == "cuda")


def moved(tensor: Tensor, home: torch.device) -> Tensor:
    """A tensor on its home device; itself where it is there already."""
    if tensor.device == home:
        return tensor
    return empty(tensor.shape, tensor.dtype, home, tensor.device).copy_(tensor)


def return_free_memory() -> None:
    """Have the C library give freed memory back to the system, where it can (glibc).

    It keeps what lies between blocks in use: after the phases of a block, each with buffers of other sizes, that came to
    half a gigabyte for a model of one.
    """
    trim = _malloc_trim() if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def format_bytes(size: float) -> str:
    """Such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return _AUTO_FRACTION * (free + reusable)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: the system can swap
        return float("inf")
    return _AUTO_FRACTION * 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
