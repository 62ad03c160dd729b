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
from torch import Tensor

from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    InputStatistics,
    NofM,
    Pattern,
    Unstructured,
    magnitude,
    solve_stacked,
)

FEW = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=3000)


@dataclass
class Problem:
    weight: Tensor
    gram: Tensor
    pattern: Pattern
    damping: float

    def error(self, pruned: Tensor) -> float:
        """``‖(W − Ŵ) H^{1/2}‖²`` with the damped Gram matrix, in float64."""
        h = self.gram.double()
        h = h + self.damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
        difference = self.weight.double() - pruned.double()
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
    return Problem(draw(weights(rows, columns)), draw(grams(columns)), pattern, draw(st.sampled_from([0.01, 0.1])))


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
        assert int(kept.sum()) <= weight.numel() - round(pattern.sparsity * weight.numel())
        if pattern.sparsity == 0:
            assert torch.equal(pruned, weight)
    if name in ("magnitude", "wanda"):
        assert torch.equal(pruned[kept], weight[kept])
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
