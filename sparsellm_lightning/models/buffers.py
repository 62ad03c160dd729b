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


def keep_in_conversions(precision: Any) -> None:
    """Have a precision plugin of Lightning leave them in float32 when it converts a module. Undo with :func:`convert_all`."""
    convert_all(precision)
    convert = precision.convert_module

    def convert_module(module: nn.Module) -> nn.Module:
        unsaved = unsaved_float32_buffers(module)
        converted: nn.Module = convert(module)
        put_back(unsaved)
        return converted

    precision.convert_module = convert_module


def convert_all(precision: Any) -> None:
    """Have a precision plugin convert modules as it does by itself."""
    vars(precision).pop("convert_module", None)


def put_back(buffers: Buffers) -> None:
    """Replace those that were rounded since, on the device where they are now."""
    for child, name, before in buffers:
        now = child._buffers[name]
        if now is not None and now.dtype != before.dtype:
            child._buffers[name] = before.to(now.device)
