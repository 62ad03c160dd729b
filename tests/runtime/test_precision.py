"""float32 products stay float32 products, whichever library makes them."""

from __future__ import annotations

import pytest
import torch

from sparsellm_lightning.runtime import coarse_dtype, fastest_float32

CPU = torch.device("cpu")


def error_of_a_product() -> float:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


def test_as_exact_as_before_and_put_back_afterwards() -> None:
    before, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    with fastest_float32(CPU):
        assert error_of_a_product() < 2e-6
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), fastest_float32(CPU):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("device", "exact", "expected"), [("cpu", True, "medium"), ("cpu", False, "highest"), ("cuda", True, "highest")]
)
def test_only_where_it_is_exact(device: str, exact: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_float32_all_the_same", lambda: exact)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with fastest_float32(torch.device(device)):
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("supported", "gain", "exact", "expected"),
    [
        (True, 2.0, False, torch.bfloat16),
        (True, 2.0, True, torch.float32),
        (True, 0.5, False, torch.float32),
        (True, 1.1, False, torch.float32),
        (False, 2.0, False, torch.float32),
    ],
)
def test_bfloat16_only_where_it_is_faster(
    supported: bool, gain: float, exact: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_has_bfloat16", lambda: supported)
    monkeypatch.setattr(products, "_gain_of_bfloat16", lambda: gain)
    assert coarse_dtype(CPU, exact) is expected


def test_the_gain_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peak(device: torch.device, dtype: torch.dtype, *args: float) -> float:
        asked.append(dtype)
        return 3.0 if dtype is torch.bfloat16 else 2.0

    monkeypatch.setattr(products, "gemm_peak", peak)
    products._gain_of_bfloat16.cache_clear()
    try:
        assert products._gain_of_bfloat16() == 1.5
        once = len(asked)
        assert products._gain_of_bfloat16() == 1.5
        assert set(asked) == {torch.float32, torch.bfloat16}
        assert len(asked) == once
    finally:
        products._gain_of_bfloat16.cache_clear()
