"""Gram matrices and their factorisation against float64 closed forms."""

from __future__ import annotations

import re

import pytest
import torch
from support.ranks import on_ranks
from torch import Tensor

from sparsellm_lightning.solvers import (
    SINGLE,
    Cross,
    Gram,
    NumericalError,
    Ranks,
    check_finite,
    factorize,
    relative_error,
    spd_inverse,
)


def tokens(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ (torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator))


def naive_gram(x: Tensor) -> Tensor:
    x = x.double()
    return sum((torch.outer(row, row) for row in x), torch.zeros(x.shape[1], x.shape[1]).double()) / max(len(x), 1)


def inverse_of(gram: Tensor, fraction: float) -> Tensor:
    h = gram.double()
    return torch.linalg.inv(h + fraction * h.diagonal().mean() * torch.eye(len(h)).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gram_is_the_mean_outer_product(dtype: torch.dtype) -> None:
    x = tokens(50, 6).to(dtype)
    gram = Gram(6)
    for chunk in x.split([20, 0, 29, 1]):
        gram.add(chunk)
    mean = gram.mean(SINGLE)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), naive_gram(x), rtol=1e-5, atol=1e-5)


def test_cross_is_the_mean_outer_product() -> None:
    a, b = tokens(50, 6), tokens(50, 4, seed=1)
    cross = Cross(6, 4)
    for part in (slice(0, 31), slice(31, 31), slice(31, 50)):
        cross.add(a[part], b[part])
    mean = cross.mean(SINGLE)
    assert mean.dtype == torch.float32
    expected = sum(torch.outer(i, j) for i, j in zip(a.double(), b.double(), strict=True)) / 50
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_do_not_depend_on_the_order_of_the_chunks() -> None:
    chunks = list((tokens(640, 16) * torch.logspace(-2, 2, 640)[:, None]).split(10))
    means = []
    for order in (chunks, chunks[::-1], chunks[1::2] + chunks[::2]):
        gram = Gram(16)
        for chunk in order:
            gram.add(chunk)
        means.append(gram.mean(SINGLE))
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


def test_gram_without_tokens_is_zero() -> None:
    assert torch.equal(Gram(3).mean(SINGLE), torch.zeros(3, 3))


# 4: the Gram matrix is computed in blocks of 4, 4 and 3 rows. 512: in one block.
@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("split", [[50], [13, 0, 37]])
def test_gram_by_blocks_and_ranks(block: int, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsellm_lightning.solvers.statistics._SYMMETRIC_BLOCK", block)
    x = tokens(50, 11)

    def mean(ranks: Ranks) -> Tensor:
        gram = Gram(11)
        gram.add(x.split(split)[ranks.rank])
        return gram.mean(ranks)

    results = on_ranks(len(split), mean)
    for result in results:
        assert torch.equal(result, results[0])
        assert torch.equal(result, result.T)
        torch.testing.assert_close(result.double(), naive_gram(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("d", [1, 2, 9])
def test_factorize(d: int, damping: float) -> None:
    gram = naive_gram(tokens(80, d)).float() * 7
    before = gram.clone()
    factor = factorize(gram, damping)
    assert torch.equal(gram, before)
    assert not factor.dead.any()
    assert torch.equal(factor.upper, factor.upper.triu())
    inverse = inverse_of(gram, damping)
    torch.testing.assert_close((factor.upper.T @ factor.upper).double(), inverse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factor.upper.double(), torch.linalg.cholesky(inverse, upper=True), rtol=1e-4, atol=1e-5)
    rows = tokens(4, d, seed=1)
    torch.testing.assert_close(factor.solve(rows).double(), rows.double() @ inverse, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damping", [0.0, 0.02])
def test_dead_features_do_not_touch_the_others(damping: float) -> None:
    x = tokens(40, 6)
    x[:, [1, 4]] = 0
    live = torch.tensor([0, 2, 3, 5])
    gram = naive_gram(x).float()
    factor = factorize(gram, damping)
    assert factor.dead.tolist() == [False, True, False, False, True, False]
    inverse = (factor.upper.T @ factor.upper).double()
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(6).double()
    expected = torch.linalg.inv(damped[live][:, live])
    torch.testing.assert_close(inverse[live][:, live], expected, rtol=1e-4, atol=1e-5)
    assert (inverse[1].nonzero().flatten().tolist(), inverse[4].nonzero().flatten().tolist()) == ([1], [4])
    # In their place the damped matrix has the mean diagonal, plus damping.
    mean = float(gram.diagonal().mean())
    torch.testing.assert_close(inverse[[1, 4], [1, 4]], torch.tensor([1 / (mean + damping * mean)] * 2).double())


def test_all_features_dead() -> None:
    factor = factorize(torch.zeros(3, 3), 0.01)
    assert factor.dead.all()
    assert torch.isfinite(factor.upper).all()
    assert (factor.upper.diagonal() > 0).all()


# The mean diagonal is 1. The smallest eigenvalues are 0 (singular), -0.05 and -5. Damping is raised tenfold from at least 1e-4.
@pytest.mark.parametrize(
    ("gram", "damping", "final", "warned"),
    [
        (torch.ones(4, 4), 0.0, 1e-3, 1),
        (torch.tensor([[1, 1.05], [1.05, 1]]), 0.01, 0.1, 1),
        (torch.tensor([[1, 6.0], [6, 1]]), 0.01, 10.0, 3),
        (torch.tensor([[1, 6.0], [6, 1]]), 0.0, 10.0, 5),
    ],
)
def test_damping_is_raised_with_a_warning(gram: Tensor, damping: float, final: float, warned: int) -> None:
    before = gram.clone()
    with pytest.warns(UserWarning, match=r"layers\.0\.up: Cholesky.*damping") as record:
        factor = factorize(gram, damping, "layers.0.up")
    assert len(record) == warned
    # Each message names the damping that failed and the one that is tried next.
    named = [re.search(r"with damping (\S+); trying (\S+)\.", str(warning.message)).groups() for warning in record]
    assert [failed for failed, _ in named] == [f"{damping:g}", *(tried for _, tried in named[:-1])]
    assert float(named[-1][1]) == pytest.approx(final)
    assert torch.equal(gram, before)
    inverse = (factor.upper.T @ factor.upper).double()
    torch.testing.assert_close(inverse, inverse_of(gram, final), rtol=1e-3, atol=1e-3)


def test_every_raise_is_tried_before_the_error() -> None:
    with (
        pytest.warns(UserWarning, match="Cholesky") as record,
        pytest.raises(NumericalError, match=r"raised to 1e\+06"),
    ):
        factorize(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 1.0)
    assert len(record) == 6


@pytest.mark.parametrize("where", [10, 90, 190])
def test_a_large_matrix_with_one_bad_place(where: int) -> None:
    """The factorisation is recursive: the place lies in one half or the other, in a leaf or in a Schur complement."""
    gram = torch.eye(200)
    gram[where, where - 5] = gram[where - 5, where] = 1.05
    with pytest.warns(UserWarning, match="Cholesky factorisation failed") as record:
        factor = factorize(gram, 0.0)
    assert len(record) == 3, "1e-3 and 1e-2 are not enough"
    inverse = (factor.upper.T @ factor.upper).double()
    torch.testing.assert_close(inverse, inverse_of(gram, 0.1), rtol=1e-3, atol=1e-3)
    with pytest.raises(NumericalError, match="must be positive definite"):
        spd_inverse(gram)


@pytest.mark.filterwarnings("ignore:.*Cholesky")
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), 1e7])
def test_a_matrix_that_no_damping_makes_definite_is_refused(entry: float) -> None:
    gram = torch.eye(3)
    gram[0, 1] = gram[1, 0] = entry
    with pytest.raises(
        NumericalError, match=r"layers\.0\.up: not positive definite even with damping raised to 10000 of"
    ):
        factorize(gram, 0.01, "layers.0.up")
    gram.diagonal().fill_(float("nan"))
    with pytest.raises(NumericalError, match="Gram matrix: not positive definite"):
        factorize(gram, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(value: float) -> None:
    gram = torch.eye(3)
    check_finite(gram, "fc1")
    gram[2, 1] = value
    with pytest.raises(NumericalError, match="input of fc1 holds NaN or infinity"):
        check_finite(gram, "fc1")


@pytest.mark.parametrize("size", [1, 3])  # 4 rows on three ranks: 2, 2, 0
def test_relative_error(size: int) -> None:
    x, dense, pruned = tokens(60, 5), tokens(4, 5, seed=1), tokens(4, 5, seed=2)
    gram = naive_gram(x).float()

    def error(ranks: Ranks) -> float:
        rows = ranks.local_rows(4)
        return relative_error(dense[rows], pruned[rows], gram, ranks)

    expected = float((x @ (dense - pruned).T).square().sum() / (x @ dense.T).square().sum())
    assert on_ranks(size, error) == pytest.approx([expected] * size, rel=1e-4)
    assert relative_error(dense, dense, gram, SINGLE) == 0


def test_relative_error_of_a_dense_output_that_is_zero() -> None:
    assert relative_error(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3), SINGLE) == 0
