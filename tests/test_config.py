"""Settings: defaults, what is refused and how, and which blocks they name."""

from __future__ import annotations

from typing import Any

import pytest

from sparsellm_lightning import PruningConfig, UserError
from sparsellm_lightning.solvers import SINGLE, NofM, Ranks, Unstructured

NAN, INF = float("nan"), float("inf")

REFUSED: list[tuple[str, Any]] = [
    *(("sparsity", value) for value in (-0.1, 1, 1.0, 70, NAN, INF)),
    *(("pattern", value) for value in ("4:2", "2:2", "0:4", "two of four", "2/4", "")),
    *(("method", value) for value in ("obs", "SparseGPT", "", 1)),
    *(("local_solver", value) for value in ("sparsellm", "alps", 1)),
    *(("target", value) for value in ("layer", "", 1)),
    *(("alternation_blocks", value) for value in ("half", "0", "")),
    *(
        (name, value)
        for name in ("num_iterations", "block_size", "num_calibration_samples")
        for value in (0, -3, 2.5, True)
    ),
    *((name, value) for name in ("alpha", "beta", "gamma") for value in (0, -0.25, INF, NAN)),
    *(("damping", value) for value in (-0.01, INF, NAN)),
    ("ignore", "down_proj"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        PruningConfig(**{name: value})
    message = str(caught.value)
    assert name in message
    assert str(value) in message.split("got", 1)[1]


ACCEPTED: list[tuple[str, Any]] = [
    *(("sparsity", value) for value in (None, 0, 0.0, 0.999)),
    *(("pattern", value) for value in ("unstructured", "2:4", "1:8")),
    *(("method", value) for value in ("sparsellm", "sparsegpt", "wanda", "magnitude")),
    *(("local_solver", value) for value in ("sparsegpt", "wanda", "magnitude")),
    *(("target", value) for value in ("block", "model")),
    *(("alternation_blocks", value) for value in ("all", "none", "first_half", [], [0, -1])),
    *((name, 1) for name in ("num_iterations", "block_size", "num_calibration_samples")),
    *((name, 1e-6) for name in ("alpha", "beta", "gamma")),
    ("damping", 0),
    ("ignore", ["down_proj"]),
    ("ignore", ()),
]


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_accepted(name: str, value: Any) -> None:
    assert getattr(PruningConfig(**{name: value}), name) == value


def test_defaults() -> None:
    config = PruningConfig(preset="paper")
    assert (config.requested_sparsity, config.pattern) == (0.5, "unstructured")
    assert (config.method, config.local_solver, config.target) == ("sparsellm", "sparsegpt", "block")
    assert (config.alternation_blocks, config.num_iterations) == ("all", 4)
    assert (config.alpha, config.beta, config.gamma, config.scale_free) == (1.0, 10.0, 1.0, True)
    assert (config.damping, config.block_size, config.skip) == (0.01, 128, ())
    assert (config.num_calibration_samples, config.seed) == (128, 0)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_model_target_needs_the_alternation(method: Any) -> None:
    with pytest.raises(UserError, match=rf"target='model'.*method is '{method}'"):
        PruningConfig(preset="paper", method=method, target="model")


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("2:3", 1 / 3)])
def test_nofm_fixes_the_sparsity(pattern: str, sparsity: float) -> None:
    kept, group = map(int, pattern.split(":"))
    for config in (
        PruningConfig(preset="paper", pattern=pattern),
        PruningConfig(preset="paper", pattern=pattern, sparsity=sparsity),
    ):
        assert config.requested_sparsity == pytest.approx(sparsity)
        assert config.build_pattern() == NofM(kept, group)
    with pytest.raises(UserError, match=rf"pattern {pattern} fixes the sparsity at 0\.\d+, got sparsity 0\.62\."):
        PruningConfig(preset="paper", pattern=pattern, sparsity=0.62)


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.7])
def test_unstructured_pattern(sparsity: float | None) -> None:
    config, ranks = PruningConfig(preset="paper", sparsity=sparsity), Ranks()
    expected = 0.5 if sparsity is None else sparsity
    assert config.requested_sparsity == expected
    pattern = config.build_pattern(ranks=ranks)
    assert isinstance(pattern, Unstructured)
    assert (pattern.sparsity, pattern.ranks) == (expected, ranks)
    assert config.build_pattern() == Unstructured(expected, SINGLE)


@pytest.mark.parametrize(
    ("blocks", "count", "expected"),
    [
        ("all", 5, {0, 1, 2, 3, 4}),
        ("none", 5, set()),
        ("first_half", 6, {0, 1, 2}),
        ("first_half", 5, {0, 1}),
        ("first_half", 1, set()),
        ([], 5, set()),
        ([0, 3], 5, {0, 3}),
        ([-1, -5], 5, {4, 0}),
        ([2, 2, -3], 5, {2}),
    ],
)
def test_alternates_in(blocks: Any, count: int, expected: set[int]) -> None:
    assert PruningConfig(preset="paper", alternation_blocks=blocks).alternates_in(count) == expected
    assert PruningConfig(preset="paper", alternation_blocks=blocks, method="sparsegpt").alternates_in(count) == set()


@pytest.mark.parametrize(("blocks", "outside"), [([5], "[5]"), ([0, -6, 4], "[-6]"), ([7, 1, 9], "[7, 9]")])
def test_blocks_outside_the_model_are_refused(blocks: list[int], outside: str) -> None:
    with pytest.raises(UserError, match="has 5") as caught:
        PruningConfig(preset="paper", alternation_blocks=blocks).alternates_in(5)
    assert outside in str(caught.value)
