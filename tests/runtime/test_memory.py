"""A smaller memory budget changes where activations are kept, never the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.feed_forward import make_block, make_tokens, prune_with
from support.models import build_model
from torch import Tensor

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning import walker as walker_module
from sparsellm_lightning.errors import OutOfMemoryError
from sparsellm_lightning.runtime import Placement, Shelf, Sizes, format_bytes, place, return_free_memory
from sparsellm_lightning.solvers import Unstructured
from sparsellm_lightning.solvers.sparsellm import solve_feed_forward

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = Sizes(work=1000, inputs=100, auxiliaries=40, predictions=40, hidden=0)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1180, Placement(GPU, GPU, True, True)),
        (1179, Placement(GPU, GPU, False, False)),
        (1140, Placement(GPU, GPU, False, False)),
        (1139, Placement(GPU, CPU, False, False)),
        (1100, Placement(GPU, CPU, False, False)),
        (1099, Placement(CPU, CPU, False, False)),
        (1000, Placement(CPU, CPU, False, False)),
    ],
)
def test_what_is_given_up_first(budget: int, expected: Placement) -> None:
    assert place(budget, SIZES, GPU) == expected


def test_the_host_has_nowhere_to_move_to() -> None:
    assert place(1140, SIZES, CPU) == Placement(CPU, CPU, False, False)
    with pytest.raises(UserError, match=r"memory must be at least .*num_calibration_samples"):
        place(1139, SIZES, CPU)
    with pytest.raises(UserError, match="memory must be at least"):
        place(999, SIZES, GPU)


def test_auto_takes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("auto", SIZES, CPU) == Placement.everything_on(CPU)
    monkeypatch.setattr("sparsellm_lightning.placement._available", lambda device: 1150.0)
    assert place("auto", SIZES, GPU) == Placement(GPU, GPU, False, False)
    monkeypatch.setattr("sparsellm_lightning.placement._available", lambda device: 0.0)
    assert place("auto", SIZES, GPU) == Placement(CPU, CPU, False, False)  # tries all the same


@pytest.mark.parametrize("value", [0, -1, True, "lots", 1.5])
def test_what_memory_may_be(value: Any) -> None:
    with pytest.raises(UserError, match="memory must be 'auto' or a positive number of bytes"):
        PruningConfig(preset="paper", memory=value)


def test_shelf_reuses_its_buffers() -> None:
    shelf = Shelf(torch.bfloat16, CPU)
    shelf.put(3, torch.ones(2, 2))
    first = shelf.get(3, CPU)
    shelf.put(3, torch.full((2, 2), 7.0))
    assert torch.equal(shelf.get(3, CPU), torch.full((2, 2), 7.0, dtype=torch.bfloat16))
    assert first.data_ptr() == shelf.get(3, CPU).data_ptr()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("iterations", [1, 3])
def test_every_placement_gives_the_same_bits(gated: bool, dtype: torch.dtype, iterations: int) -> None:
    block = make_block(gated=gated, biases=True, dim=16, width=48)
    x, y = (t.to(dtype) for t in make_tokens(block, n=600))
    chunks = [100, 200, 50, 250]
    solutions = [
        solve_feed_forward(
            block,
            x,
            y,
            prune_with(Unstructured(0.6)),
            iterations=iterations,
            chunks=chunks,
            auxiliary_dtype=torch.bfloat16,
            placement=Placement(CPU, CPU, kept, kept),
        )
        for kept in [False, True]
    ]
    for solution in solutions:
        assert solution.errors == solutions[0].errors
        assert solution.change.dtype == dtype
        assert torch.equal(solution.change, solutions[0].change)
        assert torch.equal(solution.feed_forward.up, solutions[0].feed_forward.up)
        assert torch.equal(solution.feed_forward.down, solutions[0].feed_forward.down)
    expected = solutions[0].feed_forward(x.float()) - y.float()
    rounding = float(torch.finfo(dtype).eps * y.float().abs().max())  # of h, and of the change
    torch.testing.assert_close(solutions[0].change.float(), expected, rtol=1e-2, atol=2 * rounding)


@pytest.mark.parametrize("name", ["llama", "opt-350m"])
def test_a_model_pruned_within_the_least_memory(name: str, calibration: list[dict[str, Tensor]]) -> None:
    config = {"sparsity": 0.6, "num_iterations": 2, "num_calibration_samples": 16}
    ample, tight = build_model(name), build_model(name)
    prune_model(ample, calibration, PruningConfig(**config))
    with pytest.raises(UserError, match="memory must be at least") as refused:
        prune_model(tight, calibration, PruningConfig(**config, memory=1000))
    value, unit = str(refused.value).split("at least ")[1].split(" for")[0].split()
    least = int(1.001 * float(value) * {"KiB": 2**10, "MiB": 2**20}[unit])
    prune_model(tight, calibration, PruningConfig(**config, memory=least))
    for one, other in zip(ample.parameters(), tight.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("can't allocate memory: 9")],
)
def test_out_of_memory_says_what_to_lower(
    error: RuntimeError, calibration: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(walker_module, "solve_feed_forward", fail)
    model = build_model("llama")
    with pytest.raises(
        OutOfMemoryError, match=r"layers\.0.*auxiliaries.*Lower memory.*num_calibration_samples"
    ) as raised:
        prune_model(model, calibration, PruningConfig(preset="paper", num_calibration_samples=4))
    assert str(error) in str(raised.value)
    monkeypatch.setattr(walker_module, "allocate", fail)
    with pytest.raises(OutOfMemoryError, match=r"In allocation: .*Lower memory.*num_calibration_samples"):
        prune_model(model, calibration, PruningConfig(preset="paper", num_calibration_samples=4, allocation="kl"))
    monkeypatch.setattr("sparsellm_lightning.generation._sample", fail)
    with pytest.raises(
        OutOfMemoryError, match=r"keys and values of \d+ tokens take [\d.]+ \wiB. Set continuations to 0"
    ):
        prune_model(model, calibration, PruningConfig(preset="paper", num_calibration_samples=4, continuations=1))
    monkeypatch.setattr(walker_module, "solve_feed_forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_model(model, calibration, PruningConfig(preset="paper", num_calibration_samples=4))


def test_sizes_are_those_of_what_is_held() -> None:
    sizes = Sizes.of_block(
        1000, 64, 128, gated=True, auxiliary_tokens=1000, streams=5, itemsize=4, auxiliary_itemsize=2
    )
    assert sizes.inputs == 5 * 1000 * 64 * 4
    assert sizes.auxiliaries == sizes.predictions == 2 * 1000 * 128 * 2
    local = Sizes.of_block(1000, 64, 128, gated=True, auxiliary_tokens=0, streams=5, itemsize=4, auxiliary_itemsize=2)
    assert (sizes.hidden, local.auxiliaries, local.hidden) == (0, 0, 1000 * 128 * 4)
    assert local.work < sizes.work
    assert [format_bytes(n) for n in (5, 2048, 3 * 2**20, 2**30, 1.5 * 2**40)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "1 GiB",
        "1536 GiB",
    ]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_returning_free_memory_is_harmless(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.arange(1000)
    monkeypatch.setattr("sparsellm_lightning.placement.sys.platform", platform)
    return_free_memory()
    assert torch.equal(kept, torch.arange(1000))
