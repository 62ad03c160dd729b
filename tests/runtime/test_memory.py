"""Where activations are kept under a memory budget, the measured peak, and the messages when memory runs out."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import build_model

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.errors import OutOfMemoryError
from sparsellm_lightning.pipeline import sequential
from sparsellm_lightning.pipeline.distil import Distiller
from sparsellm_lightning.pipeline.estimate import sizes_of_block
from sparsellm_lightning.runtime import (
    MemoryMeter,
    Placement,
    Sizes,
    explaining_memory,
    format_bytes,
    keeping_freed_memory,
    memory,
    peak_memory,
    place,
    return_free_memory,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = Sizes(work=1000, activations=100, auxiliaries=40)
MB = 1_000_000


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1140, Placement(GPU, GPU)),
        (1139, Placement(GPU, CPU)),
        (1100, Placement(GPU, CPU)),
        (1099, Placement(CPU, CPU)),
        (1000, Placement(CPU, CPU)),
    ],
)
def test_auxiliaries_move_to_the_host_before_activations(budget: int, expected: Placement) -> None:
    assert place(budget, SIZES, GPU) == expected


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(UserError, match=r"memory must be at least 1000 B .*got 999 B.*num_calibration_samples"):
        place(999, SIZES, GPU)
    assert place(1140, SIZES, CPU) == Placement(CPU, CPU)
    # Without an accelerator there is no other memory to move to.
    with pytest.raises(UserError, match=r"work 1000 B, activations 100 B, auxiliaries 40 B.*num_calibration_samples"):
        place(1139, SIZES, CPU)


@pytest.mark.parametrize(
    ("free", "expected"), [(1140.0, Placement(GPU, GPU)), (1100.0, Placement(GPU, CPU)), (0.0, Placement(CPU, CPU))]
)
def test_auto_takes_the_free_memory_and_refuses_nothing(
    free: float, expected: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place("auto", SIZES, CPU) == Placement(CPU, CPU)
    monkeypatch.setattr(memory, "_available", lambda device: free)
    assert place("auto", SIZES, GPU) == expected


def test_a_container_or_job_has_less_than_the_machine(tmp_path: Path) -> None:
    process, root = tmp_path / "cgroup", tmp_path / "fs"

    def group(folder: Path, limit: str, used: int, reclaimable: int, version: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        pages = {"anon": 7, "inactive_file": reclaimable} if version == 2 else {"total_inactive_file": reclaimable}
        (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in pages.items()))

    def left() -> float:
        return min(memory._left_in_control_groups(process, root))

    assert left() == math.inf
    process.write_text("0::/slurm/job_1/step\n")
    assert left() == math.inf
    group(root / "slurm/job_1/step", "max", 500, 0, 2)
    assert left() == math.inf
    group(root / "slurm/job_1", "1000", 600, 50, 2)  # the limit is the job's, not the step's
    assert left() == 450
    group(root, "900", 700, 0, 2)  # a container's own group is at the root
    assert left() == 200
    process.write_text("5:cpu:/\n4:memory,hugetlb:/docker/x:1\n0::/\n")
    (root / "memory.max").unlink()
    group(root / "memory", "300", 250, 10, 1)
    assert left() == 60


@pytest.mark.parametrize(("name", "matrices"), [("llama", 3), ("gpt2", 2)])
def test_sizes_of_a_block(name: str, matrices: int) -> None:
    layout = describe(build_model(name))
    dim, width = layout.widest
    paper = PruningConfig(preset="paper")

    def sizes(auxiliary_tokens: int, config: PruningConfig = paper) -> Sizes:
        return sizes_of_block(layout, config, 1000, auxiliary_tokens, itemsize=4, auxiliary_itemsize=2)

    alternated, local = sizes(900), sizes(0)
    assert alternated.activations == local.activations == 5 * 1000 * dim * 4
    assert sizes(0, PruningConfig(preset="fast", target="model")).activations == 9 * 1000 * dim * 4
    assert alternated.auxiliaries == (matrices - 1) * 900 * width * 2
    assert local.auxiliaries == 0
    assert alternated.work == 20 * matrices * dim * width + 44 * width**2
    assert local.work == 20 * matrices * dim * width + 36 * width**2
    assert "auxiliaries" in alternated.describe()
    assert "auxiliaries" not in local.describe()


def test_format_bytes() -> None:
    sizes = {5: "5 B", 2048: "2 KiB", 3 * 2**20: "3 MiB", 2**30: "1 GiB", 1.5 * 2**40: "1536 GiB"}
    assert [format_bytes(size) for size in sizes] == list(sizes.values())


def test_a_model_pruned_within_the_least_memory() -> None:
    config = {"preset": "paper", "sparsity": 0.6, "num_iterations": 2, "num_calibration_samples": 8}
    ample, tight, batches = build_model("llama"), build_model("llama"), random_batches()
    dense = [parameter.clone() for parameter in tight.parameters()]
    prune_model(ample, batches, PruningConfig(**config))
    with pytest.raises(UserError, match="memory must be at least") as refused:
        prune_model(tight, batches, PruningConfig(**config, memory=1000))
    for parameter, before in zip(tight.parameters(), dense, strict=True):
        assert torch.equal(parameter, before)
    value, unit = str(refused.value).split("at least ")[1].split(" for")[0].split()
    least = int(1.001 * float(value) * {"KiB": 2**10, "MiB": 2**20}[unit])
    prune_model(tight, batches, PruningConfig(**config, memory=least))
    for one, other in zip(ample.parameters(), tight.parameters(), strict=True):
        assert torch.equal(one, other)


ALLOCATOR_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("can't allocate memory: 9"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ALLOCATOR_ERRORS)
def test_an_allocator_error_gets_an_explanation(error: RuntimeError) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"^Out of memory \(.*\)\. Lower it\.$") as raised,
        explaining_memory(lambda: "Lower it."),
    ):
        raise error
    assert str(error) in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ZeroDivisionError()])
def test_other_errors_are_not_explained(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explaining_memory(lambda: "Lower it."):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("failing", "settings", "message"),
    [
        (
            "pipeline.sequential.solve_feed_forward",
            {},
            r"In model\.layers\.0: .*auxiliaries.*To need less, lower num_calibration_samples,",
        ),
        (
            "pipeline.sequential.allocate",
            {"allocation": "kl"},
            r"In allocation: .*To need less, lower num_calibration_samples,",
        ),
        (
            "data.synthetic._sample",
            {"continuations": 1},
            r"keys and values of \d+ tokens take [\d.]+ \wiB\. Set continuations to 0",
        ),
        (
            "pipeline.distil.kl_divergence",
            {"distillation_steps": 1},
            r"moments of all kept weights.*step of about 512 tokens.*Set distillation_steps to 0.*or shard",
        ),
    ],
)
def test_pruning_explains_an_allocator_error(
    failing: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ALLOCATOR_ERRORS[0]

    monkeypatch.setattr(f"sparsellm_lightning.{failing}", fail)
    config = PruningConfig(preset="paper", num_calibration_samples=4, **settings)
    with pytest.raises(OutOfMemoryError, match=message):
        prune_model(build_model("llama"), random_batches(4), config)


@pytest.mark.parametrize(("failing", "kept"), [(2, 0), (30, 20)])
def test_a_preset_without_room_for_a_step_of_distillation(
    failing: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruning is not lost, nor the best state so far: without one the model is as without the distillation."""
    settings: dict[str, Any] = {"preset": "balanced", "num_calibration_samples": 4, "reconstruction_steps": 1}
    expected, model = build_model("llama"), build_model("llama")
    prune_model(expected, random_batches(4), PruningConfig(**settings, distillation_steps=0))
    steps, divergences = itertools.count(), iter([3.0, 2.0, 1.0])

    def fail_at_last(*args: Any) -> None:
        if next(steps) == failing:
            raise ALLOCATOR_ERRORS[0]
        step(*args)

    step = Distiller._add_gradients
    monkeypatch.setattr(Distiller, "_add_gradients", fail_at_last)
    monkeypatch.setattr(Distiller, "divergence", lambda self: next(divergences))
    with pytest.warns(UserWarning, match="Preset balanced ends its distillation early"):
        report = prune_model(model, random_batches(4), PruningConfig(**settings))
    assert report.distillation == {"steps": kept, "divergence": [3.0, 2.0 if kept else 3.0]}
    same = [torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True)]
    assert all(same) == (kept == 0)


def test_pruning_does_not_explain_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "solve_feed_forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_model(build_model("llama"), random_batches(4), PruningConfig(preset="paper", num_calibration_samples=4))


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_allocator_is_left_alone_elsewhere(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    memory._allocator.cache_clear()
    with keeping_freed_memory():
        return_free_memory()
    memory._allocator.cache_clear()


@pytest.mark.skipif(memory._allocator("mallopt") is None, reason="glibc alone")
def test_freed_memory_is_kept_inside_the_context() -> None:
    """Its pages are not cleared again. Behind the context, nested ones included, they are returned."""
    resource = pytest.importorskip("resource")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(128 * MB // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with keeping_freed_memory():
        faults()
        with keeping_freed_memory():
            pass
        kept = faults()
        meter = MemoryMeter(CPU)
    torch.ones(1)
    assert MemoryMeter(CPU)._before < meter._before - 100 * MB
    faults()
    assert faults() > 4 * kept + 100  # as many as pages, which may be huge


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_added_memory_excludes_an_earlier_peak() -> None:
    earlier = torch.ones(300 * MB // 4)
    del earlier
    meter = MemoryMeter(CPU)
    during = torch.ones(60 * MB // 4)
    added, peak = meter.added(), meter.peak()
    del during
    assert added is not None
    assert peak is not None
    assert 50 * MB < added < 150 * MB
    assert peak > added


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_added_memory_includes_memory_that_is_free_again() -> None:
    meter = MemoryMeter(CPU)
    torch.ones(200 * MB // 4)
    added = meter.added()
    assert added is not None
    assert 190 * MB < added < 290 * MB


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call getrusage replaces /proc. It counts KiB on Linux and bytes on macOS."""
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    monkeypatch.setattr(memory, "_status", lambda key: None)
    expected = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = peak_memory(CPU)
    assert found is not None
    assert expected <= found <= 1.1 * expected
    added = MemoryMeter(CPU).added()
    assert added is not None
    assert added >= 0


WITHOUT_RESOURCE = """
import sys
sys.modules["resource"] = None  # importing it raises ImportError, as on Windows
import torch
import sparsellm_lightning
from sparsellm_lightning.runtime import MemoryMeter, memory, peak_memory

cpu = torch.device("cpu")
if sys.platform == "linux":
    assert peak_memory(cpu) > 10_000_000
    assert MemoryMeter(cpu).added() >= 0
memory._status = lambda key: None  # no /proc
assert peak_memory(cpu) is None
meter = MemoryMeter(cpu)
assert (meter.peak(), meter.added()) == (None, None)
print("done")
"""


def test_the_package_works_without_the_module_resource() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_RESOURCE], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "done\n"
