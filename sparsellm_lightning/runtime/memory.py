"""Memory: what a block's solve needs, where activations are kept, the peak that pruning reached, and what to say when it ran
out.

The model alone determines the size of statistics and factorisations. Two kinds of tensors grow with the calibration set: a
block's inputs and outputs (d numbers a token each, d: hidden size) and the alternation's auxiliaries (2 f numbers a token, f:
feed-forward width; f numbers if the feed-forward network is not gated).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sparsellm_lightning.errors import OutOfMemoryError, UserError

_AUTO_FRACTION = 0.8  # of the free memory; the rest is for temporaries and fragmentation
# In messages of other errors: of a CPU's tensors, of pinned memory, and of cuBLAS.
_NO_ROOM = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # options of glibc's mallopt
_keeping: list[bool] = []  # not empty inside keeping_freed_memory


@dataclass(frozen=True)
class Sizes:
    """Bytes that solving one block holds on a rank, besides the model.

    Args:
        work: the feed-forward network's weights in float32, its statistics and their factorisations.
        activations: inputs and outputs of the block and of its feed-forward network, and the outputs that it should have.
        auxiliaries: z and s of the alternation. 0 without an alternation.
    """

    work: int
    activations: int
    auxiliaries: int

    def describe(self) -> str:
        """The sizes that are not 0, in words."""
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in vars(self).items() if size)


@dataclass(frozen=True)
class Placement:
    """Devices on which a block's activations, and the alternation's auxiliaries, are kept between uses."""

    activations: torch.device
    auxiliaries: torch.device


def place(budget: int | str, sizes: Sizes, device: torch.device) -> Placement:
    """The fastest placement within a budget. First auxiliaries, then activations, move to pinned host memory.

    On a CPU there is no other memory to move to.

    Args:
        budget: bytes on the device besides the model, or ``auto``: most of what is free now.
        sizes: of the largest block.
        device: that computes.

    Raises:
        UserError: not even the smallest placement fits the bytes asked for.
    """
    limit = room(budget, device)
    host = torch.device("cpu")
    least = sizes.work if device.type != "cpu" else sizes.work + sizes.activations + sizes.auxiliaries
    if budget != "auto" and least > limit:
        raise UserError(
            f"memory must be at least {format_bytes(least)} for the largest block ({sizes.describe()}), got "
            f"{format_bytes(limit)}. Raise it, or on a CPU lower num_calibration_samples."
        )
    return Placement(
        activations=device if sizes.work + sizes.activations <= limit else host,
        auxiliaries=device if sizes.work + sizes.activations + sizes.auxiliaries <= limit else host,
    )


def room(budget: int | str, device: torch.device) -> float:
    """Bytes that a budget allows on a device. ``auto``: most of what is free now."""
    return _available(device) if budget == "auto" else float(budget)


@contextmanager
def explaining_memory(explain: Callable[[], str]) -> Iterator[None]:
    """Add an explanation to the allocator's message when there is no room.

    Raises:
        OutOfMemoryError: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _NO_ROOM):
            raise
        raise OutOfMemoryError(f"Out of memory ({str(error).splitlines()[0][:200]}). {explain()}") from error


class MemoryMeter:
    """Peak memory since the meter was made: resident memory of this process, or memory allocated on a CUDA device.

    On Linux the kernel's peak counter is reset, and on CUDA torch's. Elsewhere the peak since the process began is all that is
    known, so :meth:`added` may be too large.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):  # a kernel or a container that does not allow it
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS") or peak_memory(device)

    def peak(self) -> int | None:
        """Peak bytes, the model included. None where the system does not say."""
        return peak_memory(self._device)

    def added(self) -> int | None:
        """Peak bytes above what was in use when the meter was made."""
        peak = self.peak()
        return None if peak is None or self._before is None else max(peak - self._before, 0)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes so far: allocated on a CUDA device, or resident on the host. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (found := _status("VmHWM")) is not None:  # getrusage would include the peak of the parent process
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_free_memory() -> None:
    """Have the C library return freed memory to the system, where it can (glibc)."""
    trim = _allocator("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have the C library keep freed memory for the next tensors, where it can (glibc), and return it at the end.

    By default it maps every tensor above 32 MiB anew, and the system clears its pages one by one when they are first written.
    That takes several times as long as an elementwise operation, most of all on virtual machines.
    """
    option = _allocator("mallopt")
    if option is None or _keeping:
        yield
        return
    option(_MMAP_MAX, 0)  # a larger threshold is refused before glibc 2.34
    option(_TRIM_THRESHOLD, 2**31 - 1)
    _keeping.append(True)
    try:
        yield
    finally:
        _keeping.clear()
        # The default, and the largest thresholds to which it would have risen by itself.
        option(_MMAP_MAX, 65536)
        option(_MMAP_THRESHOLD, 32 * 2**20)
        option(_TRIM_THRESHOLD, 64 * 2**20)
        return_free_memory()


def format_bytes(size: float) -> str:
    """Such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _status(key: str) -> int | None:
    """Bytes that Linux reports for this process under a key of ``/proc/self/status``."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


@cache
def _allocator(function: str) -> Any:
    """A function of glibc's allocator. None on other systems."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return _AUTO_FRACTION * (free + reusable)
    return_free_memory()  # or it would count as used, see keeping_freed_memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: the system can swap
        return float("inf")
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return _AUTO_FRACTION * min(free, *_left_in_control_groups())


def _left_in_control_groups(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[float]:
    """Bytes that each control group of this process still allows: a container, or a job of SLURM. Infinite without a limit.

    Args:
        process: names the groups of the process, in lines ``number:controllers:path``.
        root: where version 2 of the groups is mounted, and version 1 in folders of its controllers. In a container the path may
            be the host's, and the root the container's own group.
    """
    left = [float("inf")]
    for line in process.read_text().splitlines() if process.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        left += [_left_in(top / part, *names) for part in (inside, *inside.parents)]
    return left


def _left_in(group: Path, limit: str, used: str, reclaimable: str) -> float:
    try:
        allowed, taken = (group / limit).read_text().strip(), int((group / used).read_text())
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if allowed == "max" else int(allowed) - taken + int(pages.get(reclaimable, 0))
