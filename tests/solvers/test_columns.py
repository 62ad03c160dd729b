"""Removing groups of columns, against brute force and closed forms in float64."""

from __future__ import annotations

import warnings
from itertools import combinations

import pytest
import torch
from support.local import best_error
from torch import Tensor

from sparsellm_lightning.solvers import SINGLE, Gram, InputStatistics, choose_columns, refit_columns, surgeon

ROWS, GROUPS, TOKENS, DAMPING = 7, 6, 60, 1e-3


def problem(size: int, seed: int = 0) -> tuple[Tensor, InputStatistics, Tensor]:
    """A weight, statistics of its input, and ``H = XᵀX / n + λI`` in float64. Inputs are correlated."""
    generator = torch.Generator().manual_seed(seed)
    columns = GROUPS * size
    x = torch.randn(TOKENS, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = Gram(columns)
    gram.add(x)
    weight = torch.randn(ROWS, columns, generator=generator)
    statistics = InputStatistics(gram.mean(SINGLE), DAMPING)
    exact = x.double().T @ x.double() / TOKENS
    return weight, statistics, exact + DAMPING * exact.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def columns_of(groups: Tensor, size: int) -> Tensor:
    return groups.repeat_interleave(size)


@pytest.mark.parametrize("size", [1, 3])
def test_errors_are_those_of_the_best_refit(size: int) -> None:
    weight, statistics, h = problem(size)
    order, errors = surgeon(weight, statistics, GROUPS - 1, size)
    assert sorted(order.tolist()) == sorted({*order.tolist()})
    assert [number for number, _ in errors] == list(range(GROUPS))
    for number, error in errors[1:]:
        kept = torch.ones(GROUPS, dtype=torch.bool).index_fill_(0, order[:number], False)
        assert error == pytest.approx(best_error(weight, h, columns_of(kept, size)), rel=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_one_group_is_the_best_one_and_several_are_nearly(size: int) -> None:
    best = {1: 0.0, 3: 0.0}
    found = dict.fromkeys(best, 0.0)
    for seed in range(6):
        weight, statistics, h = problem(size, seed)
        for number in best:
            choices = [
                torch.ones(GROUPS, dtype=torch.bool).index_fill_(0, torch.tensor(removed), False)
                for removed in combinations(range(GROUPS), number)
            ]
            best[number] += min(best_error(weight, h, columns_of(kept, size)) for kept in choices)
            kept = choose_columns(weight, statistics, GROUPS - number, "sparsegpt", torch.zeros(GROUPS), size)
            assert int(kept.sum()) == GROUPS - number
            found[number] += best_error(weight, h, columns_of(kept, size))
    assert found[1] == pytest.approx(best[1], rel=1e-6)
    assert found[3] < 1.25 * best[3]


def test_wanda_and_magnitude_add_up_over_a_group() -> None:
    weight, statistics, _ = problem(3)
    scores = (weight.abs() * statistics.gram.diagonal().sqrt()).sum(0).view(GROUPS, 3).sum(1)
    magnitudes = torch.arange(GROUPS).float()
    for solver, expected in (("wanda", scores), ("magnitude", magnitudes)):
        kept = choose_columns(weight, statistics, 2, solver, magnitudes, 3)
        assert set(kept.nonzero().flatten().tolist()) == set(expected.topk(2).indices.tolist())


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "admm"])
def test_magnitudes_decide_where_the_input_is_zero(solver: str) -> None:
    weight, _, _ = problem(3)
    nothing = InputStatistics(torch.zeros(3 * GROUPS, 3 * GROUPS), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = choose_columns(weight, nothing, 2, solver, torch.arange(GROUPS).float(), 3)
    assert kept.nonzero().flatten().tolist() == [GROUPS - 2, GROUPS - 1]


def test_refit_is_the_least_squares_solution() -> None:
    weight, statistics, h = problem(1)
    kept = torch.tensor([True, False, True, True, False, True])
    expected = weight.double() @ h[:, kept] @ torch.linalg.inv(h[kept][:, kept])
    torch.testing.assert_close(refit_columns(weight, statistics, kept).double(), expected, rtol=1e-3, atol=1e-4)


def test_inputs_are_not_changed() -> None:
    weight, statistics, _ = problem(3)
    before = weight.clone(), statistics.gram.clone()
    surgeon(weight, statistics, 4, 3)
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.gram, before[1])


def test_wide_groups_on_several_threads() -> None:
    """Three heads of 192 columns: the LU of MKL, with two threads, never returned."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2000, 576, generator=generator)
        gram = Gram(576)
        gram.add(x)
        weight = torch.randn(ROWS, 576, generator=generator)
        order, errors = surgeon(weight, InputStatistics(gram.mean(SINGLE), 0.1), 2, 192)
    finally:
        torch.set_num_threads(before)
    exact = x.double().T @ x.double() / 2000
    h = exact + 0.1 * exact.diagonal().mean() * torch.eye(576, dtype=torch.float64)
    for number, error in errors[1:]:
        kept = torch.ones(3, dtype=torch.bool).index_fill_(0, order[:number], False)
        assert error == pytest.approx(best_error(weight, h, columns_of(kept, 192)), rel=1e-3)


def test_blocks_that_rounding_made_indefinite() -> None:
    """More columns than tokens, no damping to speak of, equal columns: finite errors, and the exact number of columns."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    gram = Gram(24)
    gram.add(x)
    weight = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(1))
    order, errors = surgeon(weight, InputStatistics(gram.mean(SINGLE), 1e-7), 5, 4)
    assert len(set(order.tolist())) == 5
    assert all(error == error and abs(error) < 1e6 for _, error in errors)
