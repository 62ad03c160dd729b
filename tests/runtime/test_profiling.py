"""Seconds by phase, and floating-point operations against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from support.feed_forward import make_block, make_tokens
from support.models import SEQUENCE, build_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.data import rewrite_windows
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.runtime import gemm_peak
from sparsellm_lightning.solvers import LOCAL_SOLVERS, SINGLE, Cross, Gram, InputStatistics, Unstructured
from sparsellm_lightning.solvers.local import refined
from sparsellm_lightning.solvers.sparsellm import solve_feed_forward


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose hand is its only entry."""
    now = [0.0]
    monkeypatch.setattr("sparsellm_lightning.stopwatch.time.perf_counter", lambda: now[0])
    return now


def test_inner_phases_take_their_time_from_outer_ones(clock: list[float]) -> None:
    seen: list[str] = []
    watch = Stopwatch(on_phase=seen.append)
    with watch.phase("outer"):
        clock[0] += 2
        with watch.phase("inner"):
            clock[0] += 5
        with watch.phase("inner"):
            clock[0] += 1
        clock[0] += 10
    clock[0] += 100
    assert watch.seconds == {"outer": 12, "inner": 6}
    assert seen == ["outer", "inner"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt2"])
def test_work_of_a_forward(name: str) -> None:
    model = build_model(name)
    model.set_attn_implementation("eager")  # made of products that torch counts
    block = describe(model).blocks[0]
    ids = torch.randint(0, 512, (2, SEQUENCE))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    inside = next(v for k, v in counter.get_flop_counts().items() if k.endswith(block.name))
    attention = sum(count for op, count in inside.items() if "bmm" in str(op))
    # Here the half above the diagonal is computed too.
    assert 2 * SEQUENCE * block.forward_work(SEQUENCE) == sum(inside.values()) - attention // 2
    assert block.forward_work(SEQUENCE, until=0) == 0
    first = sum(p.shape[0] * p.shape[1] for p in block.attention[0])
    assert 2 * SEQUENCE * block.forward_work(SEQUENCE, until=1) == 4 * SEQUENCE * first + attention // 2
    rest = sum(2 * p.shape[0] * p.shape[1] for p in block.feed_forward.values())
    in_front = block.forward_work(SEQUENCE, until=len(block.attention))
    assert in_front == block.forward_work(SEQUENCE) - rest


def test_work_of_statistics() -> None:
    x, y = torch.randn(30, 1300), torch.randn(30, 20)
    gram, cross = Gram(1300), Cross(20, 1300)
    watch = Stopwatch()
    with FlopCounterMode(display=False) as counter:
        with watch.phase("gram"):
            gram.add(x)
        with watch.phase("cross"):
            cross.add(y, x)
        with watch.phase("nothing"):
            assert torch.equal(gram.mean(SINGLE), gram.total.float())
    work = {phase: counts[torch.float32] for phase, counts in watch.work.items()}
    assert work["gram"] + work["cross"] == counter.get_total_flops()
    assert work["gram"] < 0.75 * 2 * 30 * 1300**2  # the half below the diagonal is left out, but for blocks
    assert "nothing" not in watch.work


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_work_of_written_windows(name: str) -> None:
    model = build_model(name)
    watch = Stopwatch()
    with FlopCounterMode(display=False) as counter, watch.phase("generation"):
        rewrite_windows(model, torch.randint(0, 512, (2, SEQUENCE)), ["a", "b"], StrategyAdapter())
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    # The products of attention are left out, and vectors (biases, norms) counted in.
    assert watch.work["generation"][torch.float32] == pytest.approx(counter.get_total_flops() - attention, rel=0.02)


@pytest.mark.parametrize("rows", [64, 200])
@pytest.mark.parametrize("solver", ["sparsegpt", "admm", "refine"])
def test_work_of_local_solvers(rows: int, solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 256, generator=generator) for n in (rows, 1000))
    inputs = InputStatistics(x.T @ x / len(x), 0.01)
    pattern = Unstructured(0.6)
    watch = Stopwatch()
    in_place = {torch.ops.aten.addmm_: lambda to, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, watch.phase("solve"):
        if solver == "refine":
            magnitude = weight * pattern.select(weight.square())
            refined(magnitude, weight, inputs, pattern, "mask")
        else:
            LOCAL_SOLVERS[solver](weight, inputs, pattern, 128)
    # torch does not count triangular solves and outer products, we only the leading term of a factorisation and a sweep.
    assert watch.work["solve"][torch.float32] == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_work_of_the_alternation(gated: bool, iterations: int) -> None:
    block = make_block(gated=gated, dim=16, width=32)
    x, y = make_tokens(block, n=20_000)
    watch = Stopwatch()
    with FlopCounterMode(display=False) as counter, watch.phase("alternation"):
        solve_feed_forward(
            block,
            x,
            y,
            lambda targets, inputs: {k: 0.9 * w for k, w in targets.items()},
            iterations=iterations,
        )
    # What is left out, such as the leaves of a factorisation, does not grow with the tokens.
    assert watch.work["alternation"].total() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_report_tells_seconds_work_and_peak(calibration: list[dict[str, Tensor]]) -> None:
    report = prune_model(
        build_model("llama"), calibration, PruningConfig(preset="paper", sparsity=0.7, num_calibration_samples=16)
    )
    assert set(report.phases) == {"forward", "statistics", "local_solve", "alternation"} == set(report.work)
    assert sum(report.phases.values()) <= report.wall_seconds
    assert "float32" in report.gemm_peak
    assert all(peak > 0 for peak in report.gemm_peak.values())
    ideal = sum(n / report.gemm_peak[d] for counts in report.work.values() for d, n in counts.items())
    assert report.peak_share() == pytest.approx(ideal / report.wall_seconds)
    assert 0 < report.peak_share("forward") < 1.5
    assert "alternation" in report.phase_table()


def test_the_progress_bar_shows_every_phase_but_not_its_every_turn(
    calibration: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("sparsellm_lightning.pruning.tqdm.set_postfix", lambda bar, s, **_: drawn.append(s["phase"]))
    monkeypatch.setattr("sparsellm_lightning.pruning.SECONDS_A_DRAW", 1e6)
    config = PruningConfig(preset="paper", sparsity=0.7, num_calibration_samples=16)
    report = prune_model(build_model("llama"), calibration, config, progress=True)
    assert sorted(drawn) == sorted(report.phases)


def test_gemm_peak_is_the_fastest_of_some_products(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 3, 4, 10, 11, 11.5])  # until 5; two products, of 2 and 1 seconds
    monkeypatch.setattr("sparsellm_lightning.stopwatch.time.perf_counter", lambda: next(ticks))
    assert gemm_peak(torch.device("cpu"), torch.float32, size=16, seconds=5) == 2 * 16**3
