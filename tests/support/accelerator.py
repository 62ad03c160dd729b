"""A device that computes on the CPU but behaves as one of its own, so that code for accelerators runs in every test.

Inside :func:`accelerator`, a tensor on :data:`DEVICE` is a wrapper around a CPU tensor. As on a GPU, an operation refuses
tensors of two devices, except for copies, for indices and for CPU scalars, and NumPy refuses the tensor until it is moved back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import lightning.pytorch.accelerators
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from transformers import PreTrainedModel

_CPU = torch.device("cpu")
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default, _aten._local_scalar_dense.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._unsafe_index.Tensor}


class _Event:
    """Work on this device is done when its call returns."""

    def record(self, stream: Any = None) -> _Event:
        return self

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class _Stream(_Event):
    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Module(backend_registration._DummyBackendModule):
    """The functions that torch and Lightning expect of ``torch.<device type>``."""

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None: ...

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        yield

    def Stream(self, device: Any = None, priority: int = 0) -> _Stream:
        return _Stream()

    def Event(self, *args: Any, **kwargs: Any) -> _Event:
        return _Event()


backend_registration._setup_privateuseone_for_python_backend("accel", backend_module=_Module())
DEVICE = torch.device("accel", 0)
# FSDP2 waits for gathered weights that a backward pass did not use. torch's own function knows no backend in Python.
torch.accelerator.current_stream = lambda device=None: _Stream()  # type: ignore[assignment, misc]


class OnAccelerator(Tensor):
    """A tensor on :data:`DEVICE`.

    Attributes:
        inside: the CPU tensor that holds the numbers.
    """

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> OnAccelerator:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=DEVICE,
            requires_grad=inside.requires_grad,
        )
        made.inside = inside
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnAccelerator({self.inside!r})"

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.inside.numpy(force=True)

    def tolist(self) -> Any:
        return self.inside.tolist()

    def untyped_storage(self) -> Any:
        return self.inside.untyped_storage()

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Accelerator(TorchDispatchMode):
    """Catches operations without tensors of the device, such as ``torch.zeros(3, device=DEVICE)``."""

    def __torch_dispatch__(self, func: Any, classes: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    inside_args, inside_kwargs = _inside(args, tensors), _inside(kwargs, tensors)
    here = [value for value in tensors if isinstance(value, OnAccelerator)]
    _refuse_mixtures(func, args, tensors, here)
    wanted = kwargs.get("device")
    if wanted is not None:
        outputs_here = _is_here(wanted)
        inside_kwargs["device"] = _CPU if outputs_here else wanted
    elif func is _aten.copy_.default:
        outputs_here = isinstance(args[0], OnAccelerator)
    else:
        outputs_here = bool(here)
    result = func(*inside_args, **inside_kwargs)
    if not outputs_here:
        return result
    wrapped = _wrapped(result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if here and _aliases(func) else wrapped


def _inside(value: Any, found: list[Tensor]) -> Any:
    """The argument with CPU tensors in place of wrappers. Appends its tensors to ``found``.

    Written here because torch's pytrees take two thirds of a test's time.
    """
    if isinstance(value, Tensor):
        found.append(value)
        return value.inside if isinstance(value, OnAccelerator) else value
    if isinstance(value, dict):
        return {key: _inside(each, found) for key, each in value.items()}
    return type(value)([_inside(each, found) for each in value]) if isinstance(value, (list, tuple)) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return OnAccelerator(value)
    return type(value)([_wrapped(each) for each in value]) if isinstance(value, (list, tuple)) else value


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation returns a view of an argument, or the argument itself."""
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _refuse_mixtures(func: Any, args: Any, tensors: list[Tensor], here: list[Tensor]) -> None:
    if not here or func in _MOVES:
        return
    if func in _INDEXED and isinstance(args[0], OnAccelerator):
        tensors = [args[0], *(value for value in args[2:] if isinstance(value, Tensor))]  # indices may lie on the CPU
    elsewhere = [value for value in tensors if not isinstance(value, OnAccelerator) and value.dim() > 0]
    if elsewhere:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got some on {DEVICE} and some on "
            f"{elsewhere[0].device}, of shape {tuple(elsewhere[0].shape)}"
        )


_CPUGenerator = torch.Generator


class _IsGenerator(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _CPUGenerator)


class _Generator(metaclass=_IsGenerator):
    """``torch.Generator``, which knows no generators of this device. Those of the CPU stand in."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _CPUGenerator("cpu" if _is_here(device) else device)


# Threads that load a model run outside the mode.
_library = torch.library.Library("aten", "IMPL")
for _name in ("empty.memory_format", "empty_strided"):
    _overload = getattr(getattr(_aten, _name.split(".")[0]), (*_name.split("."), "default")[1])
    _library.impl(_name, lambda *args, _overload=_overload, **kwargs: _run(_overload, args, kwargs), "PrivateUse1")


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """Tensors may be put on :data:`DEVICE` inside this context."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) is a move, which the mode sees
    try:
        with _Accelerator(), mock.patch.object(torch, "Generator", _Generator):
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the device. Modules replace their parameters when they move there, which would untie a tied head."""
    model.to(DEVICE)
    model.tie_weights()
    return model


class Accelerator(lightning.pytorch.accelerators.Accelerator):
    """For ``Trainer(accelerator=Accelerator(), strategy=SingleDeviceStrategy(DEVICE))``."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE.type

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


@contextmanager
def collectives_on_the_device() -> Iterator[None]:
    """Collectives inside this context refuse tensors of the CPU, as NCCL does."""

    def refusing(collective: Any) -> Any:
        def on_device(*args: Any, **kwargs: Any) -> Any:
            tensors: list[Tensor] = []
            inside_args, inside_kwargs = _inside(args, tensors), _inside(kwargs, tensors)
            if not all(isinstance(tensor, OnAccelerator) for tensor in tensors):
                raise RuntimeError(f"No backend type associated with device type cpu ({collective.__name__})")
            return collective(*inside_args, **inside_kwargs)

        return on_device

    names = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "broadcast",
        "_broadcast_coalesced",
        "gather",
        "reduce_scatter_tensor",
    )
    world = torch.distributed.distributed_c10d._get_default_group()
    backend = torch.distributed.ProcessGroup.BackendType.GLOO
    world._register_backend(DEVICE, backend, world._get_backend(_CPU))
    with (
        mock.patch.multiple(torch.distributed, **{name: refusing(getattr(torch.distributed, name)) for name in names}),
        mock.patch.object(torch.distributed.distributed_c10d, "_get_pg_default_device", return_value=DEVICE),
    ):
        yield
