"""Removing hidden units, against brute force and closed forms in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from support.feed_forward import DIM, TOKENS, WIDTH, make_block
from support.local import best_error

from sparsellm_lightning.solvers import SINGLE, Gram, InputStatistics, remove_units, with_zeros, without_units

DAMPING = 1e-4


def problem(gated: bool = True, width: int = WIDTH, seed: int = 0):  # type: ignore[no-untyped-def]
    block = make_block("silu", gated, biases=True, width=width, seed=seed)
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed + 10))
    return block, x


def error_of(h: torch.Tensor, down: torch.Tensor, kept: Iterable[int]) -> float:
    """``min ‖h W_dᵀ − h_K Vᵀ‖² + λ‖W_d − V‖²`` over V, in float64."""
    h = h.double()
    penalty = DAMPING * float((h**2).mean()) * len(h)
    mask = torch.zeros(WIDTH, dtype=torch.bool).index_fill_(0, torch.tensor([*kept]), True)
    return best_error(down, h.T @ h + penalty * torch.eye(WIDTH, dtype=torch.float64), mask)


@pytest.mark.parametrize("gated", [True, False])
def test_one_unit_is_the_best_one(gated: bool) -> None:
    for seed in range(5):
        block, x = problem(gated, seed=seed)
        removal = remove_units(block, x, WIDTH - 1, "sparsegpt", damping=DAMPING)
        h = block.hidden(x)
        errors = [error_of(h, block.down, [j for j in range(WIDTH) if j != unit]) for unit in range(WIDTH)]
        assert int((~removal.kept).nonzero()) == min(range(WIDTH), key=errors.__getitem__)


def test_several_units_are_nearly_the_best_ones() -> None:
    """Greedy, one after the other: near the best of all 126 choices, and better than both other criteria."""
    totals = dict.fromkeys(("best", "sparsegpt", "wanda", "magnitude"), 0.0)
    for seed in range(8):
        block, x = problem(seed=seed)
        h = block.hidden(x)
        totals["best"] += min(error_of(h, block.down, kept) for kept in combinations(range(WIDTH), 5))
        for method in ("sparsegpt", "wanda", "magnitude"):
            kept = remove_units(block, x, 5, method, damping=DAMPING).kept
            assert int(kept.sum()) == 5
            totals[method] += error_of(h, block.down, kept.nonzero().flatten().tolist())
    assert totals["sparsegpt"] < 1.2 * totals["best"]
    assert totals["sparsegpt"] < 0.9 * min(totals["wanda"], totals["magnitude"])


def test_the_others_make_up_for_those_that_leave() -> None:
    """The refitted down projection is the least-squares one."""
    block, x = problem()
    removal = remove_units(block, x, 5, "admm", damping=DAMPING)
    h = block.hidden(x).double()
    part = h[:, removal.kept]
    penalty = DAMPING * float((h**2).mean()) * len(h)
    pull = penalty * torch.eye(5, dtype=torch.float64)
    wanted = torch.linalg.solve(
        part.T @ part + pull, part.T @ h @ block.down.T.double() + pull @ block.down.T[removal.kept].double()
    )
    torch.testing.assert_close(removal.small.down.double(), wanted.T, rtol=1e-3, atol=1e-4)
    assert torch.equal(removal.small.up, block.up[removal.kept])
    assert torch.equal(removal.small.gate_bias, block.gate_bias[removal.kept])  # type: ignore[arg-type,index]


@pytest.mark.parametrize("seed", range(4))
def test_wanda_and_magnitude_leave_weights_as_they_are(seed: int) -> None:
    block, x = problem(seed=seed)
    # So that absolute values rank otherwise than squares.
    spread = torch.linspace(0, 3, DIM).exp()
    assert block.gate is not None
    block = replace(block, up=block.up * spread, gate=block.gate * 2 * spread, down=block.down * spread[:, None])
    assert block.gate is not None
    h = block.hidden(x)
    for method, scores in (
        ("wanda", block.down.abs().sum(0) * h.norm(dim=0)),
        ("magnitude", block.up.norm(dim=1) ** 2 + block.gate.norm(dim=1) ** 2 + block.down.norm(dim=0) ** 2),
    ):
        removal = remove_units(block, x, 4, method)
        assert set(removal.kept.nonzero().flatten().tolist()) == set(scores.topk(4).indices.tolist())
        assert torch.equal(removal.small.down, block.down[:, removal.kept])


def test_full_size_matrices_give_the_output_of_the_small_block() -> None:
    block, x = problem()
    removal = remove_units(block, x, 4, "sparsegpt")
    weights = with_zeros(removal.small, removal.kept)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "gate": (WIDTH, DIM),
        "up": (WIDTH, DIM),
        "down": (DIM, WIDTH),
    }
    torch.testing.assert_close(replace(block, **weights)(x), removal.small(x))


def test_units_that_are_never_active_leave_first() -> None:
    block, x = problem()
    block.up[3], block.up_bias[3] = 0, 0  # type: ignore[index]
    block.up[7], block.up_bias[7] = 0, 0  # type: ignore[index]
    kept = remove_units(block, x, WIDTH - 2, "sparsegpt").kept
    assert (~kept).nonzero().flatten().tolist() == [3, 7]


def test_many_units_leave_several_at_a_time() -> None:
    """1,600 of 2,000 units, in 512 steps: exactly so many, at a lower error than Wanda's choice."""
    block, _ = problem(width=2000)
    x = torch.randn(500, DIM, generator=torch.Generator().manual_seed(1))
    errors = {}
    for method in ("sparsegpt", "wanda"):
        removal = remove_units(block, x, 400, method)
        assert int(removal.kept.sum()) == 400
        small = without_units(block, removal.hidden, removal.kept)
        errors[method] = float((small(x) - block(x)).norm())
    assert errors["sparsegpt"] < errors["wanda"]


def test_statistics_are_summed_over_chunks() -> None:
    block, x = problem()
    gram = Gram(WIDTH)
    gram.add(block.hidden(x))
    expected = InputStatistics(gram.mean(SINGLE), 0.01)
    found = remove_units(block, x, 4, "sparsegpt", chunks=[30, 25, 15]).hidden
    torch.testing.assert_close(found.gram, expected.gram)
