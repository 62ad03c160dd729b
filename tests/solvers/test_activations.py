"""The z and s steps against a fine grid, and the derivatives against autograd."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.activations import ACT2FN

from sparsellm_lightning.solvers import activations
from sparsellm_lightning.solvers.activations import (
    Fused,
    find_activation,
    in_slices,
    preactivation_step,
    solve_preactivation,
)

NAMES = ["relu", "silu", "gelu", "gelu_new", "quick_gelu"]
WEIGHTS = [(1.0, 1.0), (10.0, 1.0), (3.0, 30.0)]  # alpha, gamma


def entries(seed: int, *shape: int, sigma: float = 2.0) -> Tensor:
    return sigma * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objective(name: str, t: Tensor, m: Tensor, p: Tensor, c: Tensor | None, alpha: float, gamma: float) -> Tensor:
    t, m, p = t.double(), m.double(), p.double()
    return alpha * (t - m).square() + gamma * (p - (1.0 if c is None else c.double()) * ACT2FN[name](t)).square()


def grid_minimum(name: str, m: Tensor, p: Tensor, c: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """Minimum over 2001 points of the interval outside which the first term alone exceeds the objective at m."""
    radius = (objective(name, m, m, p, c, alpha, gamma) / alpha).sqrt()
    points = m.double()[:, None] + radius[:, None] * torch.linspace(-1, 1, 2001).double()
    scale = None if c is None else c[:, None]
    return objective(name, points, m[:, None], p[:, None], scale, alpha, gamma).amin(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("alpha", "gamma"), WEIGHTS)
def test_solve_preactivation(name: str, scaled: bool, alpha: float, gamma: float) -> None:
    m, p, c = entries(1, 1500), entries(2, 1500), entries(3, 1500) if scaled else None
    m[:3], p[:3] = 0, torch.tensor([0.0, 3.0, -3.0])
    result = solve_preactivation(find_activation(name), m, p, torch.tensor(gamma / alpha), c)
    assert (result.shape, result.dtype) == (m.shape, m.dtype)
    reached = objective(name, result, m, p, c, alpha, gamma)
    assert (reached <= objective(name, m, m, p, c, alpha, gamma) * (1 + 1e-5) + 1e-6).all()
    minimum = grid_minimum(name, m, p, c, alpha, gamma)
    if name == "relu":
        assert (reached <= minimum * (1 + 1e-5) + 1e-6).all()
    assert float(reached.mean()) <= 1.01 * float(minimum.mean()) + 1e-6
    assert float((reached <= 1.01 * minimum + 1e-5).double().mean()) >= 0.99


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaled", [False, True])
def test_extreme_entries_stay_finite_and_no_worse_than_m(name: str, scaled: bool) -> None:
    values = [-1e4, -30.0, -1e-6, 0.0, 1e-6, 30.0, 1e4]
    m, p, c = torch.tensor(list(itertools.product(values, values, values))).T
    scale = c if scaled else None
    result = solve_preactivation(find_activation(name), m, p, torch.tensor(1.0), scale)
    assert torch.isfinite(result).all()
    reached, start = (objective(name, t, m, p, scale, 1.0, 1.0) for t in (result, m))
    assert (reached <= start * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scaled", [False, True])
def test_entries_are_independent(name: str, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of a view, solved seven at a time, equal the entries solved one at a time."""
    m, p, c = (entries(seed, 5, 6).T for seed in (1, 2, 3))
    before = m.clone(), p.clone(), c.clone()
    monkeypatch.setattr(activations, "_SLICE", 7)
    activation, rho = find_activation(name), torch.tensor(2.0)

    def solve(m: Tensor, p: Tensor, *c: Tensor) -> tuple[Tensor]:
        return (solve_preactivation(activation, m, p, rho, *c),)

    (result,) = in_slices(solve, m, p, *([c] if scaled else []))
    assert all(torch.equal(old, new) for old, new in zip(before, (m, p, c), strict=True))
    for i, j in itertools.product(range(6), range(5)):
        one = (slice(i, i + 1), slice(j, j + 1))
        (alone,) = solve(m[one], p[one], *([c[one]] if scaled else []))
        torch.testing.assert_close(result[one], alone, rtol=5e-3, atol=5e-3)  # the minimum is flat


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "quick_gelu"])
def test_derivatives(name: str) -> None:
    t = torch.linspace(-8, 8, 161).double().requires_grad_()
    phi = ACT2FN[name](t)
    (first,) = torch.autograd.grad(phi.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    exact = find_activation(name).derivatives is not None
    assert exact == (name != "quick_gelu")
    tolerance = 1e-9 if exact else 1e-3
    for actual, expected in zip(find_activation(name).expand(t.detach()), (phi, first, second), strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "relu",
        "silu",
        "swish",
        "gelu",
        "gelu_python",
        "gelu_new",
        "gelu_fast",
        "gelu_accurate",
        "gelu_pytorch_tanh",
        "tanh",
    ],
)
def test_activations_are_those_of_transformers(name: str) -> None:
    t = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(find_activation(name)(t), ACT2FN[name](t), rtol=1e-5, atol=1e-5)
    assert find_activation(name).is_relu == (name == "relu")


def test_unknown_name() -> None:
    with pytest.raises(KeyError):
        find_activation("no such activation")


def step_inputs(gated: bool, dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """Arguments of the z step, or of the z and s steps: predictions for z (and s), s, p, and the penalties."""
    stored = [entries(seed, *shape).to(dtype) for seed in ((1, 2, 3) if gated else (1,))]
    return [*stored, entries(4, *shape), *(torch.tensor(rho) for rho in ((0.7, 3.0) if gated else (3.0,)))]


@pytest.mark.parametrize("name", ["relu", "silu", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_of_a_gated_block(name: str, dtype: torch.dtype) -> None:
    m_z, m_s, s, p, rho_z, rho_s = step_inputs(True, dtype, 500)
    z, new, correction_z, correction_s = preactivation_step(find_activation(name), True)(m_z, m_s, s, p, rho_z, rho_s)
    assert {t.dtype for t in (z, new, correction_z, correction_s)} == {dtype}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    phi = ACT2FN[name](s.double())
    # The least-squares solution of two equations in one unknown: z = m and sqrt(rho) phi z = sqrt(rho) p.
    wanted = (m_z.double() + rho_z.double() * phi * p.double()) / (1 + rho_z.double() * phi**2)
    torch.testing.assert_close(z.double(), wanted, **tolerance)
    reached = objective(name, new, m_s, p, wanted, 1.0, float(rho_s))
    minimum = grid_minimum(name, m_s, p, wanted, 1.0, float(rho_s))
    assert float((reached <= 1.01 * minimum + tolerance["atol"]).double().mean()) >= 0.99
    torch.testing.assert_close(correction_z.double(), wanted - m_z.double(), **tolerance)
    torch.testing.assert_close((m_s + correction_s).double(), new.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("bounds", [(-1.0, 1.5), (-6.0, 8.0), (0.5, 0.6)])
def test_a_clamped_factor(name: str, bounds: tuple[float, float]) -> None:
    """z minimises its objective over a grid, in which it is clamped; s is that of the clamped z."""
    m_z, m_s, s, p, rho_z, rho_s = step_inputs(True, torch.float32, 400)
    step = preactivation_step(find_activation(name), True, bounds)
    z, new, correction, _ = step(3 * m_z, m_s, s, p, rho_z, rho_s)

    def cost(z: Tensor) -> Tensor:
        product = ACT2FN[name](s.double()) * z.clamp(*bounds)
        return (z - 3 * m_z.double()).square() + rho_z.double() * (p.double() - product).square()

    grid = torch.linspace(-15, 15, 3001, dtype=torch.float64)[:, None]
    least = cost(grid.expand(-1, len(m_z))).min(0).values
    assert bool((cost(z.double()) <= least + 1e-5).all())
    torch.testing.assert_close(3 * m_z + correction, z, rtol=1e-5, atol=1e-5)
    _, same, _, _ = preactivation_step(find_activation(name), True)(z.clamp(*bounds), m_s, s, p, 0 * rho_z, rho_s)
    torch.testing.assert_close(new, same)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_of_a_plain_block(name: str, dtype: torch.dtype) -> None:
    """The correction is what is added to the prediction, not yet rounded."""
    m, p, rho = step_inputs(False, dtype, 500)
    z, correction = preactivation_step(find_activation(name), False)(m, p, rho)
    assert {t.dtype for t in (z, correction)} == {dtype}
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    reached = objective(name, z, m, p, None, 1.0, float(rho))
    minimum = grid_minimum(name, m, p, None, 1.0, float(rho))
    assert float((reached <= 1.01 * minimum + tolerance["atol"]).double().mean()) >= 0.99
    torch.testing.assert_close((m + correction).float(), z.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("gated", "name"), [(False, "relu"), pytest.param(True, "gelu", marks=pytest.mark.slow)])
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_the_fused_step_equals_the_step(gated: bool, name: str) -> None:
    graphs = counters["stats"]["unique_graphs"]
    step = preactivation_step(find_activation(name), gated)
    fused = Fused(step)
    for shape in ((0, 4), (3, 7), (40, 32), (17, 64)):
        inputs = step_inputs(gated, torch.bfloat16, *shape)
        with torch.compiler.set_stance("force_eager"):  # the stance while pruning
            results = fused(*inputs)
        for result, expected in zip(results, in_slices(step, *inputs), strict=True):
            assert result.dtype == expected.dtype == torch.bfloat16
            assert result.shape == shape
            different = (result - expected).abs() > 0.05 + 0.05 * expected.abs()
            assert float(different.double().sum()) <= 0.01 * different.numel()
    assert counters["stats"]["unique_graphs"] > graphs, "it ran uncompiled"


def test_without_a_compiler_the_step_runs_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = preactivation_step(find_activation("silu"), False), []

    def broken(function: object, dynamic: bool) -> object:
        def compiled(*tensors: Tensor) -> None:
            calls.append(1)
            raise RuntimeError("No working C++ compiler found")

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    fused, inputs = Fused(step), step_inputs(False, torch.float32, 6, 5)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(fused(*inputs), in_slices(step, *inputs), strict=True))
    assert len(calls) == 1  # not tried again
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    Fused(step)(*inputs)
    assert len(calls) == 1
