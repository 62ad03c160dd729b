"""Seconds by phase, and floating-point operations against torch's own counter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.batches import random_batches
from support.feed_forward import make_block, make_tokens
from support.models import SEQUENCE, build_model
from torch.utils.flop_counter import FlopCounterMode

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.data import rewrite_windows
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.runtime import Profile, gemm_peak, phase
from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    SINGLE,
    Cross,
    Gram,
    InputStatistics,
    Unstructured,
    count,
    solve_feed_forward,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows the only entry of this list."""
    now = [0.0]
    monkeypatch.setattr("sparsellm_lightning.runtime.profiling.time.perf_counter", lambda: now[0])
    return now


def test_inner_phases_take_their_time_from_outer_phases(clock: list[float]) -> None:
    seen: list[str] = []
    profile = Profile(on_phase=seen.append)
    with profile.collecting():
        with phase("outer"):
            clock[0] += 2
            with phase("inner"):
                clock[0] += 5
            with phase("inner"):
                clock[0] += 1
            clock[0] += 10
        clock[0] += 100
    assert profile.seconds == {"outer": 12, "inner": 6}
    assert seen == ["outer", "inner"]


def test_operations_belong_to_the_inner_phase() -> None:
    profile = Profile()
    with profile.collecting():
        count(1)
        with phase("outer"):
            count(2)
            with phase("inner"):
                count(4)
                count(8, torch.bfloat16)
            count(16)
    count(32)
    assert profile.work == {"outer": Counter({torch.float32: 18}), "inner": {torch.float32: 4, torch.bfloat16: 8}}


def test_without_a_profile_a_phase_does_nothing(clock: list[float]) -> None:
    profile = Profile()

    def fail() -> None:
        clock[0] += 2
        raise ZeroDivisionError

    with phase("before"):
        clock[0] += 1
    with pytest.raises(ZeroDivisionError), profile.collecting(), phase("inside"):
        fail()
    with phase("after"):
        clock[0] += 4
    assert profile.seconds == {"inside": 2}


def test_phases_belong_to_the_innermost_profile(clock: list[float]) -> None:
    outer, inner = Profile(), Profile()
    with outer.collecting():
        with inner.collecting(), phase("phase"):
            clock[0] += 1
            count(1)
        with phase("phase"):
            clock[0] += 2
            count(2)
    assert (inner.seconds, outer.seconds) == ({"phase": 1}, {"phase": 2})
    assert inner.work["phase"].total() == 1
    assert outer.work["phase"].total() == 2


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_work_of_a_forward(name: str) -> None:
    model = build_model(name)
    model.set_attn_implementation("eager")  # torch counts the products of this implementation
    block = describe(model).blocks[0]
    ids = torch.randint(0, 512, (2, SEQUENCE))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    inside = next(v for k, v in counter.get_flop_counts().items() if k.endswith(block.name))
    attention = sum(count for op, count in inside.items() if "bmm" in str(op))
    # The eager implementation also computes the half above the diagonal.
    assert 2 * SEQUENCE * block.forward_work(SEQUENCE) == sum(inside.values()) - attention // 2
    inputs, outputs, network = block.units
    assert block.forward_work(SEQUENCE, until=inputs.observed) == 0
    first = sum(p.size for p in inputs.projections)
    in_front = block.forward_work(SEQUENCE, until=outputs.observed)
    assert 2 * SEQUENCE * in_front == 4 * SEQUENCE * first + attention // 2
    rest = sum(2 * p.size for p in network.projections)
    assert block.forward_work(SEQUENCE, until=network.observed) == block.forward_work(SEQUENCE) - rest


def test_work_of_statistics() -> None:
    x, y = torch.randn(30, 1300), torch.randn(30, 20)
    gram, cross = Gram(1300), Cross(20, 1300)
    profile = Profile()
    with FlopCounterMode(display=False) as counter, profile.collecting():
        with phase("gram"):
            gram.add(x)
        with phase("cross"):
            cross.add(y, x)
        with phase("mean"):
            gram.mean(SINGLE)
    work = {name: counts[torch.float32] for name, counts in profile.work.items()}
    assert set(work) == {"gram", "cross"}
    assert work["gram"] + work["cross"] == counter.get_total_flops()
    assert work["gram"] < 0.75 * 2 * 30 * 1300**2  # blocks below the diagonal are not computed


def test_work_of_written_windows() -> None:
    model = build_model("llama")
    profile = Profile()
    with FlopCounterMode(display=False) as counter, profile.collecting(), phase("generation"):
        rewrite_windows(model, torch.randint(0, 512, (2, SEQUENCE)), ["a", "b"], StrategyAdapter())
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    # Not counted: the products of attention. Counted: vectors (biases, norms), as if they were matrices.
    assert profile.work["generation"][torch.float32] == pytest.approx(counter.get_total_flops() - attention, rel=0.02)


@pytest.mark.parametrize(("solver", "rows"), [("sparsegpt", 64), ("sparsegpt", 200), ("admm", 64)])
def test_work_of_local_solvers(solver: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 256, generator=generator) for n in (rows, 1000))
    inputs = InputStatistics(x.T @ x / len(x), 0.01)
    profile = Profile()
    in_place = {torch.ops.aten.addmm_: lambda to, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch does not count this one
    with (
        FlopCounterMode(display=False, custom_mapping=in_place) as counter,
        profile.collecting(),
        phase("solve"),
    ):
        LOCAL_SOLVERS[solver](weight, inputs, Unstructured(0.6))
    # torch does not count triangular solves and outer products. The package counts only the leading term of a factorisation
    # and of a sweep.
    assert profile.work["solve"][torch.float32] == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.parametrize(("gated", "iterations"), [(True, 1), (True, 3), (False, 3)])
def test_work_of_the_alternation(gated: bool, iterations: int) -> None:
    block = make_block(gated=gated, dim=16, width=32)
    x, y = make_tokens(block, n=8000)
    profile = Profile()
    with FlopCounterMode(display=False) as counter, profile.collecting(), phase("alternation"):
        solve_feed_forward(
            block,
            x,
            y,
            lambda targets, inputs: {k: 0.9 * w for k, w in targets.items()},
            iterations=iterations,
        )
    # Operations that are not counted, such as the leaves of a factorisation, do not grow with the tokens.
    assert profile.work["alternation"].total() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_share_of_the_peak() -> None:
    """Of 20 seconds, the products would take 2 at the peaks of their dtypes: 1.5 forward, 0.5 to solve."""
    report = prune_model(build_model("llama"), random_batches(), PruningConfig(preset="paper", method="magnitude"))
    report.gemm_peak = {"float32": 100.0, "bfloat16": 400.0}
    report.work = {"forward": {"float32": 100.0, "bfloat16": 200.0}, "local_solve": {"float32": 50.0}}
    report.phases, report.wall_seconds = {"forward": 5.0, "local_solve": 10.0, "other": 3.0}, 20.0
    assert report.peak_share() == pytest.approx(0.1)
    assert report.peak_share("forward") == pytest.approx(0.3)
    assert report.peak_share("forward", "local_solve") == pytest.approx(2 / 15)
    assert report.peak_share("other") == 0


def test_the_report_holds_seconds_work_and_peak() -> None:
    config = PruningConfig(preset="paper", sparsity=0.7, num_calibration_samples=8)
    report = prune_model(build_model("llama"), random_batches(), config)
    assert set(report.phases) == {"forward", "statistics", "local_solve", "alternation"} == set(report.work)
    assert sum(report.phases.values()) <= report.wall_seconds
    assert "float32" in report.gemm_peak
    assert "alternation" in report.phase_table()
    if report.peak_memory_bytes is not None:
        assert report.added_memory_bytes is not None
        assert 0 <= report.added_memory_bytes < report.peak_memory_bytes


def test_the_progress_bar_draws_each_phase_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within ``SECONDS_A_DRAW`` a phase is drawn once, however often it begins."""
    drawn: list[str] = []
    monkeypatch.setattr(
        "sparsellm_lightning.runtime.progress.tqdm.set_postfix", lambda bar, s, **_: drawn.append(s["phase"])
    )
    monkeypatch.setattr("sparsellm_lightning.runtime.progress.SECONDS_A_DRAW", 1e6)
    monkeypatch.setattr("sparsellm_lightning.runtime.progress.draws_bars", lambda: True)
    config = PruningConfig(preset="paper", sparsity=0.7, num_calibration_samples=8)
    report = prune_model(build_model("llama"), random_batches(), config, progress=True)
    assert sorted(drawn) == sorted(report.phases)


def test_gemm_peak_is_the_fastest_of_several_products(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 3, 4, 10, 11, 11.5])  # the end is 5: two products, of 2 seconds and of 1 second
    monkeypatch.setattr("sparsellm_lightning.runtime.profiling.time.perf_counter", lambda: next(ticks))
    assert gemm_peak(torch.device("cpu"), torch.float32, size=16, seconds=5) == 2 * 16**3
    ticks = iter([0, 1, 3, 4, 10, 12, 13])  # of the size 256 and then 512
    assert gemm_peak(torch.device("cpu"), torch.float32, seconds=5) == 2 * 512**3 / 2
