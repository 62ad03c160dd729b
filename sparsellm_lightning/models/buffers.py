"""Buffers that no checkpoint holds, such as the frequencies of rotary embeddings.

``Trainer(precision="bf16-true")`` rounds them with the parameters. A model that is loaded from its files in bfloat16 computes
them in float32, so the rounded model is not the one that an export holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def kept_in_float32(module: nn.Module) -> Iterator[None]:
    """After a conversion inside this context, float32 buffers outside the module's state are so again, on their new device."""
    before = [
        (child, name, buffer)
        for child in module.modules()
        for name in sorted(child._non_persistent_buffers_set)
        if (buffer := child._buffers[name]) is not None and buffer.dtype == torch.float32
    ]
    yield
    for child, name, buffer in before:
        now = child._buffers[name]
        if now is not None and now.dtype != buffer.dtype:
            child._buffers[name] = buffer.to(now.device)


class _Keeping:
    """A precision plugin's ``convert_module`` that keeps these buffers. Pickled with the Trainer if workers are not forked."""

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def __call__(self, module: nn.Module) -> Any:
        with kept_in_float32(module):
            return type(self.precision).convert_module(self.precision, module)


def keep_in_conversions(precision: Any) -> None:
    """Have a precision plugin of Lightning keep unsaved float32 buffers in conversions, until :func:`stop_keeping`."""
    precision.convert_module = _Keeping(precision)


def stop_keeping(precision: Any) -> None:
    """Undo :func:`keep_in_conversions`."""
    vars(precision).pop("convert_module", None)
