"""Storage of activations between uses, on the device that computes or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype, storage: torch.device, device: torch.device) -> Tensor:
    """An uninitialised tensor on ``storage``, in pinned memory where ``device`` is a CUDA device and ``storage`` the host."""
    return torch.empty(shape, dtype=dtype, device=storage, pin_memory=storage.type == "cpu" and device.type == "cuda")


def moved(tensor: Tensor, storage: torch.device) -> Tensor:
    """The tensor on ``storage``. A tensor that is there already is returned as it is."""
    if tensor.device == storage:
        return tensor
    return empty(tensor.shape, tensor.dtype, storage, tensor.device).copy_(tensor)


class Shelf:
    """Tensors by number. Each has a buffer that is allocated once and written again.

    Args:
        dtype: of the stored tensors.
        storage: device of the buffers.
    """

    def __init__(self, dtype: torch.dtype, storage: torch.device) -> None:
        self.dtype, self.storage = dtype, storage
        self._tensors: dict[int, Tensor] = {}

    def put(self, index: int, tensor: Tensor) -> None:
        """Store a copy of a tensor."""
        if index not in self._tensors:
            self._tensors[index] = empty(tensor.shape, self.dtype, self.storage, tensor.device)
        self._tensors[index].copy_(tensor, non_blocking=True)

    def get(self, index: int, device: torch.device) -> Tensor:
        """A stored tensor on ``device``."""
        return self._tensors[index].to(device, non_blocking=True)

    def clear(self) -> None:
        """Free all buffers."""
        self._tensors.clear()


class TokenBuffer:
    """A (tokens, features) tensor that is filled in order, in the dtype of the first part that is added.

    Args:
        tokens: number of rows.
        features: number of columns.
        storage: device of the tensor.
    """

    def __init__(self, tokens: int, features: int, storage: torch.device) -> None:
        self.shape, self.storage = (tokens, features), storage
        self._data: Tensor | None = None
        self._position = 0

    def add(self, x: Tensor) -> None:
        """Append tokens, (n, features)."""
        if self._data is None:
            self._data = empty(self.shape, x.dtype, self.storage, x.device)
        self._data[self._position : self._position + len(x)] = x
        self._position += len(x)

    def filled(self) -> Tensor:
        """The tensor. On a rank without tokens it is empty."""
        return torch.empty(0, self.shape[1], device=self.storage) if self._data is None else self._data
