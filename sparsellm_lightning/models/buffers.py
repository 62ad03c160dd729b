"""What stays in float32 when a module is converted.

``Trainer(precision="bf16-true")`` rounds all tensors. ``from_pretrained`` in bfloat16 keeps two kinds of tensors in float32:
buffers that no checkpoint holds, such as the frequencies of rotary embeddings, and tensors that the model's class lists, such
as routers. So a model that the Trainer has rounded would differ from the same model loaded from its export.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def kept_in_float32(module: nn.Module) -> Iterator[None]:
    """After a conversion inside this context, these tensors are float32 again, as they were, on their new device.

    Float32 buffers outside the module's state, and parameters and buffers in ``_keep_in_fp32_modules_strict`` of a
    ``PreTrainedModel``.
    """
    before = [
        (child, name, buffer)
        for child in module.modules()
        for name in sorted(child._non_persistent_buffers_set)
        if (buffer := child._buffers[name]) is not None and buffer.dtype == torch.float32
    ]
    named = [(tensor, tensor.data) for tensor in _named_by_class(module) if tensor.dtype == torch.float32]
    yield
    for tensor, exact in named:
        if tensor.dtype != torch.float32:
            tensor.data = exact.to(tensor.device)
    for child, name, buffer in before:
        now = child._buffers[name]
        if now is not None and now.dtype != buffer.dtype:
            child._buffers[name] = buffer.to(now.device)


def _named_by_class(module: nn.Module) -> Iterator[Tensor]:
    for model in module.modules():
        for pattern in getattr(model, "_keep_in_fp32_modules_strict", None) or ():
            wanted = re.compile(r"(^|\.)" + ".*".join(map(re.escape, pattern.split("*"))) + r"(\.|$)")
            tensors = chain(model.named_parameters(), model.named_buffers())
            yield from (tensor for name, tensor in tensors if wanted.search(name))


class _Keeping:
    """A precision plugin's ``convert_module`` that keeps these tensors. Pickled with the Trainer if workers are not forked."""

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def __call__(self, module: nn.Module) -> Any:
        with kept_in_float32(module):
            return type(self.precision).convert_module(self.precision, module)


def keep_in_conversions(precision: Any) -> None:
    """Have a precision plugin of Lightning keep what stays in float32 in conversions, until :func:`stop_keeping`."""
    precision.convert_module = _Keeping(precision)


def stop_keeping(precision: Any) -> None:
    """Undo :func:`keep_in_conversions`."""
    vars(precision).pop("convert_module", None)
