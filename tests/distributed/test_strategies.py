"""DDP and FSDP2 with gloo processes on the CPU, against one process; CUDA, NCCL and FSDP1 where there are GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm_lightning.architecture import describe

JOB = Path(__file__).with_name("distributed_job.py")


def launch(folder: Path, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(JOB), str(folder), str(folder / "job.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeed(folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    run = launch(folder, **options)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads((folder / "out" / "pruning_report.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder / "out"), report


def mask(model: PreTrainedModel) -> torch.Tensor:
    weights = (p.parameter.detach() for p in describe(model).projections())
    return torch.cat([(w != 0).flatten() for w in weights])


def assert_same(one: tuple[PreTrainedModel, dict[str, Any]], many: tuple[PreTrainedModel, dict[str, Any]]) -> None:
    equal = float((mask(one[0]) == mask(many[0])).double().mean())
    assert equal >= 0.999, f"{100 * equal:.3f} % of mask entries equal"
    assert many[1]["sparsity"]["achieved"] == pytest.approx(one[1]["sparsity"]["achieved"], abs=1e-5)
    for state in ("dense", "pruned"):
        assert many[1]["perplexity"][state] == pytest.approx(one[1]["perplexity"][state], rel=5e-3)
    assert many[1]["calibration"] == one[1]["calibration"]


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, _trained: Callable[[str], PreTrainedModel], tokenizer
) -> Callable[[str], str]:
    folders: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            _trained(name).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return get


# Windows that two and three ranks share unevenly; "sequences" of 64 tokens.
WINDOWS = 65


@pytest.mark.parametrize(
    ("name", "pruner"),
    [
        ("llama", {"sparsity": 0.7, "method": "sparsellm"}),
        ("llama", {"pattern": "2:4", "method": "sparsellm", "num_iterations": 2}),
        ("llama", {"sparsity": 0.6, "method": "wanda", "continuations": 1, "solver_precision": "float32"}),
        ("opt", {"sparsity": 0.7, "method": "sparsellm", "target": "model"}),
        ("opt", {"sparsity": 0.6, "method": "magnitude"}),
        ("gpt2", {"sparsity": 0.6, "method": "sparsegpt"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for v in value.values()),
)
def test_same_answer_on_any_number_of_ranks(
    tmp_path: Path, folder_of: Callable[[str], str], name: str, pruner: dict[str, Any]
) -> None:
    options = {"job": "prune", "model": folder_of(name), "pruner": {**pruner, "num_calibration_samples": WINDOWS}}
    one = succeed(tmp_path / "one", **options)
    for strategy, processes in (("ddp", 2), ("fsdp2", 2), ("ddp" if name == "opt" else "fsdp2", 3)):
        folder = tmp_path / f"{strategy}{processes}"
        many = succeed(folder, strategy=strategy, processes=processes, **options)
        assert_same(one, many)
        if strategy == "ddp":
            first, *others = [torch.load(folder / f"weights_{rank}.pt") for rank in range(processes)]
            for other in others:
                assert all(torch.equal(first[key], other[key]) for key in first), "all ranks end bit-equal"


def test_reconstruction_and_measured_budgets(tmp_path: Path, folder_of: Callable[[str], str]) -> None:
    """Steps of half the windows: which they are differs with the number of ranks, and so do the weights a little.

    Batches of three windows are spread unevenly: one rank has two windows of a batch, and the other one.
    """
    tuned = {"steps": 16, "batch_tokens": 2048, "learning_rate": 0.01}
    pruner: dict[str, Any] = {"sparsity": 0.7, "method": "sparsegpt", "target": "model", "allocation": "kl"}
    pruner |= {"reconstruct": tuned, "num_calibration_samples": WINDOWS}
    options: dict[str, Any] = {
        "job": "prune",
        "model": folder_of("llama"),
        "pruner": pruner,
        "batch_size": 3,
        "timeout": 120,
    }
    one = succeed(tmp_path / "one", **options)
    for strategy in ("ddp", "fsdp2"):
        model, report = succeed(tmp_path / strategy, strategy=strategy, processes=2, **options)
        assert report["calibration"] == one[1]["calibration"]
        assert report["perplexity"]["pruned"] == pytest.approx(one[1]["perplexity"]["pruned"], rel=0.03)
        for layer, expected in zip(report["layers"], one[1]["layers"], strict=True):
            assert layer["sparsity"] == pytest.approx(expected["sparsity"], abs=1e-3), layer["name"]
        projections = list(describe(model).projections())
        zeros = [int((p.parameter == 0).sum()) for p in projections]
        assert sum(zeros) == round(0.7 * sum(p.parameter.numel() for p in projections)), "all of them exact"
        for block, expected in zip(report["blocks"], one[1]["blocks"], strict=True):
            found, wanted = block["reconstruction"], expected["reconstruction"]
            assert found["steps"] > 0
            assert found["held_out"][1] < found["held_out"][0]
            assert found["held_out"][1] == pytest.approx(wanted["held_out"][1], rel=0.05)
        # Before the first block is tuned, only rounding is between them.
        before = [r["blocks"][0]["reconstruction"]["held_out"][0] for r in (report, one[1])]
        assert before[0] == pytest.approx(before[1], rel=0.02)
    first, second = (torch.load(tmp_path / "ddp" / f"weights_{rank}.pt") for rank in range(2))
    assert any("norm" in key for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first), "all ranks end bit-equal"
    dense = AutoModelForCausalLM.from_pretrained(folder_of("llama")).state_dict()
    assert any(not torch.equal(tensor, dense[key]) for key, tensor in first.items() if "norm" in key)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_traffic_does_not_grow_with_tokens(tmp_path: Path, folder_of: Callable[[str], str], strategy: str) -> None:
    sent = []
    for windows in (16, 64):
        folder = tmp_path / str(windows)
        pruner = {"sparsity": 0.6, "num_calibration_samples": windows, "measure": False}
        run = launch(folder, job="prune", model=folder_of("llama"), strategy=strategy, processes=2, pruner=pruner)
        assert run.returncode == 0, run.stderr[-4000:]
        sent.append(json.loads((folder / "traffic_1.json").read_text()))
    assert sent[1]["elements"] == sent[0]["elements"]
    d, f, blocks, iterations = 64, 128, 3, 4
    # Per block and iteration: the Gram (f²) and cross matrices (3 df) of both ranks, the rows gathered (3 df); besides
    # those, three Gram matrices of inputs (d²), attention's weights gathered (3 d²) and the dense feed-forward (3 df).
    matrices = iterations * (2 * f * f + 9 * d * f) + 9 * d * d + 3 * d * f
    # Thresholds: three histograms of 2048 counts from each of two ranks, per matrix and 128 columns; and a few scalars.
    thresholds = (3 * iterations + 4) * 3 * 2048 * 2
    bound = blocks * (matrices + thresholds)
    assert sent[0]["elements"] < bound
    block = 4 * d * d + 3 * d * f
    assert sent[0]["largest"] <= block


def test_calibration_from_a_sharded_train_loader(tmp_path: Path, folder_of: Callable[[str], str]) -> None:
    """Every window of the loader is used, each once: the masks of one process, whatever the order of the windows."""
    # All tokens are fitted and carry auxiliaries: which windows come first is up to the sampler, and another with more ranks.
    pruner = {"sparsity": 0.6, "num_calibration_samples": 24, "num_iterations": 2, "measure": False}
    pruner |= {"alternation_tokens": 10**9, "held_out": 0.0}
    options = {"job": "prune_from_train_loader", "model": folder_of("llama"), "pruner": pruner}
    one = succeed(tmp_path / "one", **options)
    two = succeed(tmp_path / "two", **options, strategy="ddp", processes=2)
    calibration = {"windows": 24, "held_out": 0, "written": 0, "tokens": 24 * 64, "source": "training dataloader"}
    assert one[1]["calibration"] == two[1]["calibration"] == calibration
    assert float((mask(one[0]) == mask(two[0])).double().mean()) >= 0.999


def test_the_same_generated_windows_on_every_rank(tmp_path: Path, folder_of: Callable[[str], str]) -> None:
    """Seven windows, three at a time: two ranks share them unevenly, and make unlike batches of them."""
    for strategy, processes in ((None, 1), ("ddp", 2), ("fsdp2", 2)):
        folder = tmp_path / (strategy or "one")
        run = launch(folder, job="generate", model=folder_of("llama"), strategy=strategy, processes=processes)
        assert run.returncode == 0, run.stderr[-4000:]
        expected = torch.load(tmp_path / "one" / "windows_0.pt")
        assert [windows.shape for windows in expected] == [(1, 32), (7, 32)]
        for rank in range(processes):
            found = torch.load(folder / f"windows_{rank}.pt")
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{strategy}, rank {rank}"


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_precisions(tmp_path: Path, folder_of: Callable[[str], str], strategy: str, precision: str) -> None:
    pruner = {"sparsity": 0.6, "num_calibration_samples": WINDOWS, "num_iterations": 2}
    options = {"job": "prune", "model": folder_of("llama"), "pruner": pruner}
    one = succeed(tmp_path / "one", **options)
    model, report = succeed(tmp_path / "two", **options, strategy=strategy, processes=2, precision=precision)
    assert model.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert report["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.002)
    assert report["perplexity"]["pruned"] == pytest.approx(one[1]["perplexity"]["pruned"], rel=0.05)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_and_checkpointed_blocks(tmp_path: Path, folder_of: Callable[[str], str], strategy: str) -> None:
    pruner = {"sparsity": 0.6, "num_calibration_samples": WINDOWS, "num_iterations": 2}
    options = {"job": "prune", "model": folder_of("llama"), "pruner": pruner}
    assert_same(
        succeed(tmp_path / "one", **options),
        succeed(tmp_path / "two", **options, strategy=strategy, processes=2, compile=True),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ddp"},
        {"strategy": "ddp", "lora": True},
        {"strategy": "fsdp2", "sharded_checkpoint": True, "distilled": True},
        {"strategy": "fsdp2", "sharded_checkpoint": False, "lora": True},
        {"strategy": "fsdp2", "sharded_checkpoint": False, "mixing": True},
    ],
    ids=lambda options: "-".join(str(key if value is True else value) for key, value in options.items()),
)
def test_life(tmp_path: Path, folder_of: Callable[[str], str], options: dict[str, Any]) -> None:
    """Prune, train, save, resume without pruning again, export; every zero held on every rank (see the job)."""
    model, report = succeed(
        tmp_path / "two",
        job="life",
        model=folder_of("llama"),
        processes=2,
        pruner={"sparsity": 0.7, "num_calibration_samples": 16, "num_iterations": 2},
        **options,
    )
    assert (tmp_path / "two" / "stopped.ckpt").is_dir() == options.get("sharded_checkpoint", False)
    kept = mask(model)
    assert 1 - float(kept.double().mean()) == pytest.approx(report["sparsity"]["achieved"], abs=1e-6)
    assert report["sparsity"]["achieved"] == pytest.approx(0.7, abs=0.002)
    assert report["perplexity"]["finetuned"] < report["perplexity"]["pruned"]
    assert report["mask_check"]["broken"] == 0
    unstopped = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "unstopped")
    for (name, resumed), straight in zip(model.named_parameters(), unstopped.parameters(), strict=True):
        assert torch.equal(resumed, straight), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("error", ["ValueError", "KeyboardInterrupt"])
def test_a_failing_rank_ends_the_run(
    tmp_path: Path, folder_of: Callable[[str], str], strategy: str, failing_rank: int, error: str
) -> None:
    start = time.monotonic()
    run = launch(
        tmp_path,
        job="fail",
        model=folder_of("llama"),
        strategy=strategy,
        processes=2,
        failing_rank=failing_rank,
        error=error,
        pruner={"sparsity": 0.6, "num_calibration_samples": 16, "measure": False},
    )
    assert run.returncode != 0
    assert time.monotonic() - start < 60
    assert f"Pruning failed on rank {failing_rank}: {error}" in run.stderr


def test_tensor_parallelism_is_refused(tmp_path: Path, folder_of: Callable[[str], str]) -> None:
    run = launch(tmp_path, job="prune", model=folder_of("llama"), strategy="tensor_parallel", processes=2)
    assert run.returncode != 0
    assert "tensor_parallel_size=1" in run.stderr


gpus = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU: CUDA, NCCL and FSDP1")


@gpus
@pytest.mark.parametrize("strategy", [None, "ddp", "fsdp2", "fsdp1"])
def test_on_gpu(tmp_path: Path, folder_of: Callable[[str], str], strategy: str | None) -> None:
    pruner = {"sparsity": 0.6, "num_calibration_samples": WINDOWS, "num_iterations": 2}
    options = {"job": "prune", "model": folder_of("llama"), "pruner": pruner}
    processes = min(2, torch.cuda.device_count())
    one = succeed(tmp_path / "one", **options)
    many = succeed(tmp_path / "gpu", **options, strategy=strategy, processes=processes, accelerator="gpu")
    equal = float((mask(one[0]) == mask(many[0])).double().mean())
    assert equal > 0.98  # other kernels round otherwise
    assert many[1]["perplexity"]["pruned"] == pytest.approx(one[1]["perplexity"]["pruned"], rel=0.02)
