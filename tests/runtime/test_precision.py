"""Float32 products keep float32's accuracy with every library, and bfloat16 follows from the hardware alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from support.models import build_model
from support.runs import make_context
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig
from sparsellm_lightning.calibration import context
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.pipeline.sequential import _auxiliary_dtype
from sparsellm_lightning.runtime import coarse_dtype, fastest_float32, precision
from sparsellm_lightning.solvers import Penalties

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def error_of_a_product() -> float:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


def test_products_stay_exact_and_the_setting_is_restored() -> None:
    before, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    with fastest_float32(CPU):
        assert error_of_a_product() < 2e-6
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), fastest_float32(CPU):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_compares_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Noting(StrategyAdapter):
        def run_model(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
            seen.append(torch.get_float32_matmul_precision())
            super().run_model(model, inputs)

    monkeypatch.setattr(precision, "_medium_is_exact", lambda: False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        Noting().describe(build_model("llama"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("outside", ["highest", "high"])  # Lightning advises high, which is TF32 on CUDA devices
@pytest.mark.parametrize(
    ("device", "exact", "expected"), [(CPU, True, "medium"), (CPU, False, "highest"), (GPU, True, "highest")]
)
def test_products_are_coarser_only_where_they_stay_exact(
    outside: str, device: torch.device, exact: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_medium_is_exact", lambda: exact)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(outside)
        with fastest_float32(device):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == outside
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_precision_that_was_set_for_a_library(device: torch.device) -> None:
    """torch refuses to name a precision that was set by the newer way."""
    matmul: Any = getattr(torch.backends.cuda.matmul, "fp32_precision", None) and torch.backends.cuda.matmul
    if matmul is None:
        pytest.skip("torch.backends has no fp32_precision")
    before = torch.get_float32_matmul_precision()
    try:
        matmul.fp32_precision = "tf32"
        with fastest_float32(device):
            assert device == CPU or matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clock raises, so that a timing fails."""

    def fail(*args: Any) -> float:
        raise AssertionError("the choice must not depend on a timing")

    for name in ("perf_counter", "perf_counter_ns", "process_time", "monotonic"):
        monkeypatch.setattr(time, name, fail)


@pytest.mark.usefixtures("_no_clock")
@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_bfloat16_where_the_hardware_has_matrix_units(
    device: torch.device, supported: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported

    # The other device's check says the opposite, so that the wrong check fails.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported == (device == CPU), raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    if device == GPU:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16_supported)
    else:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not supported)
    assert coarse_dtype(device) is expected
    assert coarse_dtype(device, exact=True) is torch.float32
    assert asked == ([False] if device == GPU else [])


def test_exact_products_by_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """``solver_precision``, and the raw objective, whose p enters the weight step."""
    monkeypatch.setattr(context, "coarse_dtype", lambda device, exact: torch.float32 if exact else torch.bfloat16)

    def made(**settings: Any) -> context.Context:
        return make_context(build_model("llama"), PruningConfig(**settings))

    assert made().coarse_dtype == _auxiliary_dtype(made()) == torch.bfloat16
    assert made(solver_precision="float32").coarse_dtype == torch.float32
    assert _auxiliary_dtype(made(penalties=Penalties(scale_free=False))) == torch.float32


@pytest.mark.usefixtures("_no_clock")
def test_the_choice_follows_the_check_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    for supported in (True, False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=supported: found, raising=False)
        assert coarse_dtype(CPU) is (torch.bfloat16 if supported else torch.float32)


@pytest.mark.usefixtures("_no_clock")
@pytest.mark.parametrize(("bf16", "amd"), [(True, True), (True, False), (False, True)])
def test_avx512_bf16_counts_on_amd_alone(bf16: bool, amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16, "sse4a": amd}, raising=False)
    assert coarse_dtype(CPU) is (torch.bfloat16 if bf16 and amd else torch.float32)


def test_float32_where_torch_has_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert coarse_dtype(CPU) is torch.float32


def test_float32_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert coarse_dtype(torch.device("mps")) is torch.float32
