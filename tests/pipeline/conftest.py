"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _constant_gemm_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's report gets a constant for the speed of large products, whose measurement takes longer than a tiny run."""
    monkeypatch.setattr("sparsellm_lightning.pipeline.prune.gemm_peak", lambda *args: 1e12)
