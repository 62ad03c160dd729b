"""Buffers that no checkpoint holds, such as the frequencies of rotary embeddings.

``Trainer(precision="bf16-true")`` rounds them with the parameters. A model that is loaded from its files in bfloat16 computes
them in float32, so the rounded model is not the one that an export holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Buffers = list[tuple[nn.Module, str, Tensor]]


def unsaved_float32_buffers(module: nn.Module) -> Buffers:
    """Float32 buffers inside a module that its state does not hold: owner, name and tensor."""
    return [
        (child, name, buffer)
        for child in module.modules()
        for name in sorted(child._non_persistent_buffers_set)
        if (buffer := child._buffers[name]) is not None and buffer.dtype == torch.float32
    ]


def to_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's parameters, and leave these buffers in float32."""
    unsaved = unsaved_float32_buffers(module)
    module.to(dtype)
    put_back(unsaved)


def keep_in_conversions(precision: Any) -> None:
    """Have a precision plugin of Lightning leave them in float32 when it converts a module, until :func:`stop_keeping`."""
    stop_keeping(precision)
    convert = precision.convert_module

    def convert_module(module: nn.Module) -> nn.Module:
        unsaved = unsaved_float32_buffers(module)
        converted: nn.Module = convert(module)
        put_back(unsaved)
        return converted

    precision.convert_module = convert_module


def stop_keeping(precision: Any) -> None:
    """Undo :func:`keep_in_conversions`."""
    vars(precision).pop("convert_module", None)


def put_back(buffers: Buffers) -> None:
    """Replace those that were rounded since, on the device where they are now."""
    for child, name, before in buffers:
        now = child._buffers[name]
        if now is not None and now.dtype != before.dtype:
            child._buffers[name] = before.to(now.device)
