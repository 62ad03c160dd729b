"""Losses of next-token distributions and their gradients, against PyTorch's own on float64."""

import pytest
import torch
from torch.nn import functional

from sparsellm_lightning.solvers import cross_entropy, divergence, kl_divergence


@pytest.mark.parametrize(("entries", "tokens"), [(1, 512), (40, 512), (10**6, 2)])  # in float32 at once
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("transposed", [False, True])  # in memory
def test_divergence_and_gradient(
    entries: int,
    tokens: int,
    dtype: torch.dtype,
    accuracy: float,
    reuse: bool,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(divergence, "CPU_ENTRIES", entries)
    monkeypatch.setattr(divergence, "TOKENS", tokens)
    generator = torch.Generator().manual_seed(0)
    dense, logits = (3 * torch.randn(5, 17, generator=generator) for _ in range(2))
    dense[0] = logits[0]
    dense[1, 3] = -torch.inf if dtype == torch.float32 else -1e4  # a token that the dense model excludes
    dense, logits = dense.to(dtype), logits.to(dtype)
    if transposed:
        dense, logits = dense.T.contiguous().T, logits.T.contiguous().T
    logits.requires_grad_()
    given = dense.clone()
    upstream = torch.tensor([1.0, 0.5, -2.0, 0.0, 3.0])

    reference = logits.detach().double().requires_grad_()
    temperature = 1.5
    terms = functional.kl_div(
        torch.log_softmax(reference / temperature, -1),
        torch.softmax(dense.double() / temperature, -1),
        reduction="none",
    )
    (terms.sum(-1) * upstream).sum().backward()

    found = kl_divergence(dense, logits, temperature, reuse=reuse)
    assert torch.equal(dense, given) != reuse
    (found * upstream).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), terms.sum(-1), rtol=1e-5, atol=1e-5)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=accuracy, atol=accuracy / 10)


@pytest.mark.parametrize("entries", [1, 40])
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_cross_entropy_and_gradient(
    entries: int, dtype: torch.dtype, accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CPU_ENTRIES", entries)
    logits = (3 * torch.randn(5, 17, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[1, 3] = -torch.inf
    logits[3, 0] = -torch.inf  # of a token that has no target
    logits.requires_grad_()
    targets, upstream = torch.tensor([0, 4, 16, -100, 2]), torch.tensor([1.0, 0.5, -2.0, 7.0, 3.0])
    reference = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(reference, targets, reduction="none")
    (expected * upstream).sum().backward()

    found = cross_entropy(logits, targets)
    (found * upstream).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=accuracy, atol=accuracy / 10)


@pytest.mark.parametrize("target", [-1, 17])
def test_cross_entropy_of_a_token_outside_the_vocabulary(target: int) -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(torch.zeros(2, 17), torch.tensor([0, target]))


def test_gradients_that_float16_cannot_hold_reach_the_loss_scale() -> None:
    """Of unlikely tokens, before the scale that lifts them is multiplied."""
    logits = torch.linspace(0, -15, 64).repeat(2, 1).half().requires_grad_()
    dense = logits.detach().flip(0) * 1.1
    (kl_divergence(dense, logits).sum() * 2.0**12).backward()
    exact = logits.detach().float().requires_grad_()
    (kl_divergence(dense.float(), exact).sum() * 2.0**12).backward()
    assert float(exact.grad.abs().min()) / 2**12 < 6e-8
    torch.testing.assert_close(logits.grad.float(), exact.grad, rtol=1e-3, atol=0)


def test_no_tokens() -> None:
    assert kl_divergence(torch.empty(0, 7), torch.empty(0, 7)).shape == (0,)
    assert cross_entropy(torch.empty(0, 7), torch.empty(0, dtype=torch.int64)).shape == (0,)
