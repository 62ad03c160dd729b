"""Wrong weights are looked for without a copy of them."""

from __future__ import annotations

import pytest
import torch
from support.models import build_model
from support.runs import make_context
from torch.profiler import ProfilerActivity, profile

from sparsellm_lightning import NumericalError, PruningConfig
from sparsellm_lightning.calibration import check_finite_weights

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 31, 62])
def test_one_wrong_entry_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    context = make_context(build_model("llama"), PruningConfig())
    right = {
        "empty": torch.empty(0, 7, dtype=dtype),
        "extreme": torch.tensor([torch.finfo(dtype).min, torch.finfo(dtype).max], dtype=dtype),
    }
    check_finite_weights(context, right)
    wrong = torch.linspace(-1, 1, 63).view(7, 9).to(dtype)
    wrong.view(-1)[place] = value
    with pytest.raises(NumericalError, match="wrong holds NaN or infinity"):
        check_finite_weights(context, {**right, "wrong": wrong.T})


def test_looking_copies_no_weight() -> None:
    """An embedding of a large vocabulary is a gigabyte."""
    context = make_context(build_model("llama"), PruningConfig())
    weight = torch.ones(1000, 1000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        check_finite_weights(context, {"weight": weight})
    assert max(event.self_cpu_memory_usage for event in events.key_averages()) < 1000
