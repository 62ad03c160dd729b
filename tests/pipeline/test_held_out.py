"""Held-out windows: which windows they are, that no weight is fitted to them, and that iterates are chosen on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.feed_forward import make_block, make_tokens, naive_forward, prune_with, true_error
from support.models import VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import tune_with
from torch import Tensor

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.data import fitted_windows
from sparsellm_lightning.pipeline.tune import Reconstructor
from sparsellm_lightning.solvers import SINGLE, FeedForward, InputStatistics, Ranks, Unstructured, solve_feed_forward

Targets = dict[str, Tensor]


@pytest.mark.parametrize("windows", [1, 7, 8, 65])
@pytest.mark.parametrize("fraction", [0.0, 1 / 8, 0.5])
@pytest.mark.parametrize("size", [1, 3])
def test_the_last_of_all_windows_are_held_out(windows: int, fraction: float, size: int) -> None:
    def on_rank(ranks: Ranks) -> list[int]:
        mine = list(range(windows))[ranks.rank :: size]
        return mine[: fitted_windows(len(mine), fraction, ranks)]

    fitted = [window for found in on_ranks(size, on_rank) for window in found]
    assert sorted(fitted) == list(range(windows))[: windows - int(fraction * windows)]


@pytest.mark.parametrize(
    ("counts", "fitted"), [([20, 0], [18, 0]), ([5, 3], [4, 3]), ([1, 7], [1, 6]), ([0, 1], [0, 1])]
)
def test_windows_that_ranks_share_unevenly(counts: list[int], fitted: list[int]) -> None:
    """As many are held out as of evenly shared ones."""
    assert on_ranks(2, lambda ranks: fitted_windows(counts[ranks.rank], 1 / 8, ranks)) == fitted


def windows_of(seed: int, held_out_seed: int, windows: int = 10, held_out: int = 2) -> list[dict[str, Tensor]]:
    """Random windows in batches of three. The last ``held_out`` windows come from another seed than the others."""
    ids = torch.randint(0, VOCABULARY, (windows, 24), generator=torch.Generator().manual_seed(seed))
    other = torch.randint(0, VOCABULARY, (held_out, 24), generator=torch.Generator().manual_seed(held_out_seed))
    return [{"input_ids": part} for part in torch.cat([ids[: windows - held_out], other]).split(3)]


def pruned(name: str, batches: list[dict[str, Tensor]], **settings: Any) -> tuple[dict[str, Tensor], Any]:
    model = build_model(name)
    config = PruningConfig(
        preset="paper", sparsity=0.6, calibration_val_fraction=0.2, num_calibration_samples=10, **settings
    )
    report = prune_model(model, batches, config)
    return dict(model.state_dict()), report


def always_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every iterate and every step has a smaller error than the one before, so that the last one is kept."""
    falling = itertools.count(10**6, -1)
    monkeypatch.setattr("sparsellm_lightning.solvers.sparsellm.squared_error", lambda *args: float(next(falling)))
    monkeypatch.setattr(Reconstructor, "errors", lambda *args, **kwargs: (0.5, float(next(falling))))


@pytest.mark.parametrize("name", ["llama", "opt-350m"])
@pytest.mark.parametrize(
    ("settings", "learning_rate", "forced"),
    [
        # No step of this size is kept, so that the weights are the local solver's.
        ({"method": "sparsegpt", "reconstruction_steps": 3}, 100.0, False),
        ({"method": "sparsellm", "num_iterations": 3, "target": "model"}, None, True),
        ({"method": "wanda", "reconstruction_steps": 3}, 2e-3, True),
    ],
    ids=["local", "alternation", "reconstruction"],
)
def test_no_weight_is_fitted_to_them(
    name: str, settings: dict[str, Any], learning_rate: float | None, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out windows with other tokens give bit-equal weights as long as nothing is chosen on them.

    The seventh to ninth window are one batch. Two of them are fitted. Three steps visit all batches.
    """
    tune_with(monkeypatch, learning_rate, batch_tokens=72)
    states = []
    for seed, held_out_seed in ((1, 2), (1, 3), (4, 2)):
        with monkeypatch.context() as patch:
            if forced:
                always_better(patch)
            state, report = pruned(name, windows_of(seed, held_out_seed), **settings)
        assert report.calibration == {"windows": 10, "held_out": 2, "written": 0, "tokens": 240}
        for block in report.blocks:
            tuned = block["reconstruction"]
            assert tuned is None or (tuned["steps"] > 0) == forced
            assert len(block["held_out_errors"]) == len(block["errors"])
        states.append(state)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_errors_on_them_are_reported() -> None:
    """Errors of held-out tokens depend on the held-out windows, and those of fitted tokens do not."""
    reports = [pruned("llama", windows_of(1, seed), num_iterations=2)[1] for seed in (2, 3)]
    for block, other in zip(*(report.blocks for report in reports), strict=True):
        assert block["held_out_errors"] != other["held_out_errors"]
        assert block["held_out_errors"] != block["errors"]
        if block["index"] == 0:
            assert block["errors"] == other["errors"]


@pytest.mark.parametrize(
    ("windows", "settings", "held_out"),
    [(16, {}, 2), (7, {}, 0), (8, {"num_iterations": 1}, 0), (8, {"calibration_val_fraction": 0.0}, 0)],
)
def test_number_of_held_out_windows(windows: int, settings: dict[str, Any], held_out: int) -> None:
    settings = {"num_iterations": 2, "local_solver": "magnitude", **settings}
    report = prune_model(
        build_model("llama"),
        windows_of(1, 2, windows, 0),
        PruningConfig(preset="paper", num_calibration_samples=windows, **settings),
    )
    assert report.calibration == {"windows": windows, "held_out": held_out, "written": 0, "tokens": 24 * windows}
    for block in report.blocks:
        assert len(block["errors"]) == settings["num_iterations"]
        assert len(block["held_out_errors"]) == (len(block["errors"]) if held_out else 0)


def test_methods_that_choose_nothing_see_the_last_window() -> None:
    states = [pruned("llama", windows_of(1, seed), method="sparsegpt")[0] for seed in (2, 3)]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


def scripted(block: FeedForward, factors: list[float]) -> Callable[[Targets, InputStatistics], Targets]:
    """The dense weights times the iteration's factor. An iteration makes two calls: gate and up, then down."""
    calls = itertools.count()

    def prune(targets: Targets, inputs: InputStatistics) -> Targets:
        factor = factors[next(calls) // 2]
        return {name: getattr(block, name) * factor for name in targets}

    return prune


@pytest.mark.parametrize("iterations", [1, 4])
def test_the_iterate_of_least_held_out_error_is_kept(iterations: int) -> None:
    """The target of fitted tokens is closest to the fourth iterate, that of held-out tokens to the second."""
    block, factors = make_block(biases=True), [0.7, 0.8, 0.9, 0.97]
    x, _ = make_tokens(block, 900)
    iterates = [replace(block, **{name: getattr(block, name) * f for name in ("up", "gate", "down")}) for f in factors]
    chunks, fitted = [200, 100, 300, 250, 50], slice(600)
    held_out = slice(600, None)
    y = torch.cat([naive_forward(block, x[fitted]), naive_forward(iterates[1], x[held_out])]).float()
    y += 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    seen: list[Any] = []
    solution = solve_feed_forward(
        block,
        x,
        y,
        scripted(block, factors),
        iterations=iterations,
        chunks=chunks,
        fitted_chunks=3,
        on_iteration=lambda *args: seen.append(args),
    )
    errors, held_out_errors = (
        [true_error(iterate, x[part], y[part]) for iterate in iterates[:iterations]] for part in (fitted, held_out)
    )
    assert solution.errors == pytest.approx(errors, rel=1e-3)
    assert solution.held_out_errors == pytest.approx(held_out_errors, rel=1e-3)
    assert seen == list(enumerate(solution.errors))
    kept = iterates[1 if iterations > 1 else 0]
    for name in ("up", "gate", "down"):
        assert torch.equal(getattr(solution.feed_forward, name), getattr(kept, name))
    # Only fitted tokens enter the statistics.
    h = kept.hidden(x[fitted]).double()
    torch.testing.assert_close(solution.hidden.gram.double(), h.T @ h / 600, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        solution.inputs.gram.double(), x[fitted].double().T @ x[fitted].double() / 600, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("leading", [None, 1])
@pytest.mark.parametrize("gated", [True, False])
def test_iterates_are_those_of_the_fitted_tokens_alone(gated: bool, leading: int | None) -> None:
    """Each iteration's pruned weights are bit-equal to those of a solve without the held-out tokens."""
    block = make_block("silu" if gated else "relu", gated, True, dim=16, width=32)
    x, y = make_tokens(block, n=900)
    rounds: list[list[Targets]] = []
    for tokens, fitted in ((slice(None), 2), (slice(600), None)):
        rounds.append([])

        def prune(targets: Targets, inputs: InputStatistics, seen: list[Targets] = rounds[-1]) -> Targets:
            seen.append(prune_with(Unstructured(0.6))(targets, inputs))
            return seen[-1]

        solve_feed_forward(
            block,
            x[tokens],
            y[tokens],
            prune,
            iterations=3,
            chunks=[300] * (3 if fitted else 2),
            fitted_chunks=fitted,
            leading_chunks=leading,
        )
    assert len(rounds[0]) == len(rounds[1]) == 6
    for ours, theirs in zip(*rounds, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("iterations", [1, 3])
def test_ranks_give_the_result_of_one_process(iterations: int) -> None:
    """The first rank has only fitted tokens, the second only held-out ones, the third none."""
    block = make_block("silu", True, True, dim=4, width=10)
    x, y = make_tokens(block, n=300)
    shares, fitted = [200, 100, 0], [2, 0, 0]

    def solve(ranks: Ranks) -> Any:
        x_r, y_r = (x, y) if ranks is SINGLE else (x.split(shares)[ranks.rank], y.split(shares)[ranks.rank])
        return solve_feed_forward(
            block,
            x_r,
            y_r,
            prune_with(Unstructured(0.5, ranks)),
            ranks=ranks,
            iterations=iterations,
            chunks=[100] * (len(x_r) // 100),
            fitted_chunks=2 if ranks is SINGLE else fitted[ranks.rank],
        )

    expected = solve(SINGLE)
    for solution in on_ranks(3, solve):
        assert solution.errors == pytest.approx(expected.errors, rel=1e-4)
        assert solution.held_out_errors == pytest.approx(expected.held_out_errors, rel=1e-4)
        for name in ("up", "gate", "down"):
            ours, theirs = getattr(solution.feed_forward, name), getattr(expected.feed_forward, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
