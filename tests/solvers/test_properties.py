"""Every local solver on problems that hypothesis chooses: finite weights, the exact pattern, arguments left as they are.

Solvers that correct the weights are compared with magnitude pruning on the same damped Gram matrix.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.feed_forward import make_block, make_tokens, prune_with, true_error
from torch import Tensor

from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    FeedForward,
    InputStatistics,
    NofM,
    Pattern,
    Unstructured,
    magnitude,
    solve_feed_forward,
    solve_stacked,
)

FEW = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2000)


@dataclass
class Problem:
    weight: Tensor
    gram: Tensor
    pattern: Pattern
    damping: float

    def error(self, pruned: Tensor) -> float:
        """``‖(W − Ŵ) H^{1/2}‖²`` with the damped Gram matrix, in float64, of the inputs that are not always zero."""
        h = self.gram.double()
        h = h + self.damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
        difference = (self.weight.double() - pruned.double()) * (self.gram.diagonal() > 0)
        return float(((difference @ h) * difference).sum())


@st.composite
def weights(draw: st.DrawFn, rows: int, columns: int) -> Tensor:
    """Float32 weights as a parameter of another dtype may store them: large, tiny, equal, zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, power = draw(st.sampled_from([(torch.float32, 12), (torch.bfloat16, 12), (torch.float16, 3)]))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-power, power))
    kind = draw(st.sampled_from(["random", "some zero", "few values", "all equal", "all zero", "one large"]))
    if kind == "some zero":
        weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    elif kind == "few values":
        weight = weight.sign() * weight.abs().max()
    elif kind == "all equal":
        weight = torch.full_like(weight, float(weight[0, 0]))
    elif kind == "all zero":
        weight = torch.zeros_like(weight)
    elif kind == "one large":
        weight[0, 0] = weight.abs().max() * 1000
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype).float()


@st.composite
def grams(draw: st.DrawFn, columns: int) -> Tensor:
    """Means of ``x xᵀ``: of fewer tokens than columns, with dead, duplicated and outlier inputs, of any scale."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 3 * columns)), columns, generator=generator)
    if draw(st.booleans()):
        x = x @ torch.randn(columns, columns, generator=generator)
    first, second = (draw(st.integers(0, columns - 1)) for _ in range(2))
    for change in draw(st.sets(st.sampled_from(["dead", "duplicated", "outlier", "all dead"]), max_size=3)):
        if change == "dead":
            x[:, first] = 0
        elif change == "duplicated":
            x[:, first] = x[:, second]
        elif change == "outlier":
            x[:, second] *= 1000
        elif draw(st.booleans()):
            x.zero_()
    x *= 10.0 ** draw(st.integers(-6, 6))
    return x.T @ x / len(x)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows = draw(st.integers(1, 12))
    group = draw(st.sampled_from([None, (2, 4), (1, 2), (4, 8), (1, 4)]))
    columns = draw(st.integers(1, 40)) if group is None else group[1] * draw(st.integers(1, 8))
    size = rows * columns
    pattern: Pattern = (
        Unstructured(draw(st.sampled_from([0.0, 0.5, 0.7, 0.9, 1 - 1 / size])) if size > 1 else 0.0)
        if group is None
        else NofM(*group)
    )
    return Problem(draw(weights(rows, columns)), draw(grams(columns)), pattern, draw(st.sampled_from([0.01, 0.1, 0.3])))


def check(name: str, problem: Problem) -> None:
    weight, gram, pattern = problem.weight.clone(), problem.gram.clone(), problem.pattern
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a singular Gram matrix raises the damping
        inputs = InputStatistics(gram, problem.damping)
        pruned = solve_stacked({"w": weight}, inputs, {"w": pattern}, LOCAL_SOLVERS[name])["w"]

    assert torch.equal(weight, problem.weight)
    assert torch.equal(gram, problem.gram)
    assert bool(torch.isfinite(pruned).all())

    kept = pruned != 0
    if isinstance(pattern, NofM):
        assert int(kept.view(-1, pattern.group).sum(1).max()) <= pattern.kept
    else:
        limit = weight.numel() - round(pattern.sparsity * weight.numel())
        assert int(kept.sum()) <= limit
        if pattern.sparsity == 0:
            assert torch.equal(pruned, weight)
        if bool(weight.all()) and bool(gram.diag().all()):  # a column without input is zero in any case
            assert int(kept.sum()) == limit
    if name in ("magnitude", "wanda"):
        assert torch.equal(pruned[kept], weight[kept])
        if isinstance(pattern, Unstructured):  # as many as asked for, and zeros that were there before
            limit = weight.numel() - round(pattern.sparsity * weight.numel())
            assert int(kept.sum()) >= limit - int((weight == 0).sum())
    else:
        scale = problem.error(torch.zeros_like(weight))
        assert problem.error(pruned) <= problem.error(magnitude(weight, pattern)) * (1 + 1e-4) + 1e-6 * scale


@pytest.mark.parametrize("name", LOCAL_SOLVERS)
@FEW
@given(problem=problems())
def test_local_solvers(name: str, problem: Problem) -> None:
    check(name, problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL_SOLVERS)
@MANY
@given(problem=problems())
def test_local_solvers_on_many_problems(name: str, problem: Problem) -> None:
    check(name, problem)


@pytest.mark.parametrize(("name", "most"), [("sparsegpt", 0.1), ("admm", 0.02)])
def test_solvers_themselves_seldom_lose_to_magnitude(name: str, most: float) -> None:
    """Without the fallback of :func:`solve_stacked`, which would hide a solver that is wrong."""
    worse = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = 1 + seed % 12, 8 * (1 + seed % 5)
        x = torch.randn(1 + seed % (3 * columns), columns, generator=generator)
        if seed % 2:
            x = x @ torch.randn(columns, columns, generator=generator)
        pattern: Pattern = NofM(2, 4) if seed % 3 == 0 else Unstructured((0.5, 0.7, 0.9)[seed % 5 % 3])
        problem = Problem(torch.randn(rows, columns, generator=generator), x.T @ x / len(x), pattern, 0.1)
        pruned = LOCAL_SOLVERS[name](problem.weight, InputStatistics(problem.gram, problem.damping), pattern)
        worse.append(problem.error(pruned) > problem.error(magnitude(problem.weight, pattern)) * (1 + 1e-4))
    assert sum(worse) < most * len(worse), sum(worse)


@dataclass
class Coupled:
    block: FeedForward
    x: Tensor
    y: Tensor
    pattern: Pattern
    solver: str
    chunks: list[int]  # their numbers of tokens
    fitted: int  # chunks


@st.composite
def coupled(draw: st.DrawFn) -> Coupled:
    """Feed-forward blocks of any form, with few or dead, duplicated, large and small inputs."""
    width = 4 * draw(st.integers(1, 6))
    dim = 4 * draw(st.integers(1, 4))
    activation = draw(st.sampled_from(["silu", "gelu", "relu"]))
    block = make_block(activation, draw(st.booleans()), draw(st.booleans()), dim, width, draw(st.integers(0, 2**31)))
    x, y = make_tokens(
        block, draw(st.integers(1, 60)), draw(st.sampled_from([0.0, 0.1, 3.0])), draw(st.integers(0, 2**31))
    )
    column = draw(st.integers(0, dim - 1))
    change = draw(st.sampled_from(["none", "dead", "duplicated", "outlier", "large", "small", "zero target"]))
    if change == "dead":
        x[:, column] = 0
    elif change == "duplicated":
        x[:, column] = x[:, 0]
    elif change == "outlier":
        x[:, column] *= 1000
    elif change in ("large", "small"):
        x *= 1e3 if change == "large" else 1e-6
    elif change == "zero target":
        y = torch.zeros_like(y)
    pattern = draw(st.sampled_from([Unstructured(0.0), Unstructured(0.5), Unstructured(0.9), NofM(2, 4), NofM(1, 4)]))
    chunks = [len(part) for part in x.split(-(-len(x) // 8))]
    solver, fitted = draw(st.sampled_from(list(LOCAL_SOLVERS))), draw(st.integers(1, len(chunks)))
    return Coupled(block, x, y, pattern, solver, chunks, fitted)


def check_coupled(problem: Coupled) -> None:
    """Finite, in the pattern, arguments unchanged; on the tokens that choose, not worse than the local solver."""
    block, x, y = problem.block, problem.x, problem.y
    before = {name: getattr(block, name).clone() for name in ("gate", "up", "down") if getattr(block, name) is not None}
    x_before, y_before = x.clone(), y.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune = prune_with(problem.pattern, problem.solver)
        solution = solve_feed_forward(block, x, y, prune, chunks=problem.chunks, fitted_chunks=problem.fitted)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    for name, weight in before.items():
        assert torch.equal(getattr(block, name), weight)
        pruned = getattr(solution.feed_forward, name)
        assert bool(torch.isfinite(pruned).all())
        kept = int((pruned != 0).sum())
        if isinstance(problem.pattern, NofM):
            assert int((pruned != 0).view(-1, 4).sum(1).max()) <= problem.pattern.kept
        else:
            assert kept <= weight.numel() - round(problem.pattern.sparsity * weight.numel())
    held_out = problem.fitted < len(problem.chunks)
    errors = solution.held_out_errors if held_out else solution.errors
    chosen = slice(sum(problem.chunks[: problem.fitted]) if held_out else 0, None)
    error = true_error(solution.feed_forward, x[chosen], y[chosen]) if bool(y[chosen].any()) else 0.0
    assert error <= errors[0] * (1 + 1e-3) + 1e-5


@FEW
@given(problem=coupled())
def test_the_alternation(problem: Coupled) -> None:
    check_coupled(problem)


@pytest.mark.slow
@MANY
@given(problem=coupled())
def test_the_alternation_on_many_problems(problem: Coupled) -> None:
    check_coupled(problem)
