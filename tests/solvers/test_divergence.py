"""The divergence of next-token distributions and its gradient, against PyTorch's own on float64."""

import pytest
import torch
from torch.nn import functional

from sparsellm_lightning.solvers import divergence, kl_divergence


@pytest.mark.parametrize("entries", [1, 40, 10**6])  # of the logits that are in float32 at once
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_divergence_and_gradient(
    entries: int, dtype: torch.dtype, accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CPU_ENTRIES", entries)
    generator = torch.Generator().manual_seed(0)
    dense, logits = (3 * torch.randn(5, 17, generator=generator) for _ in range(2))
    dense[0] = logits[0]
    dense[1, 3] = -torch.inf if dtype == torch.float32 else -1e4  # a token that the dense model excludes
    dense, logits = dense.to(dtype), logits.to(dtype).requires_grad_()
    upstream = torch.tensor([1.0, 0.5, -2.0, 0.0, 3.0])

    reference = logits.detach().double().requires_grad_()
    temperature = 1.5
    terms = functional.kl_div(
        torch.log_softmax(reference / temperature, -1),
        torch.softmax(dense.double() / temperature, -1),
        reduction="none",
    )
    (terms.sum(-1) * upstream).sum().backward()

    found = kl_divergence(dense, logits, temperature)
    (found * upstream).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), terms.sum(-1), rtol=1e-5, atol=1e-5)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=accuracy, atol=accuracy / 10)


def test_no_tokens() -> None:
    assert kl_divergence(torch.empty(0, 7), torch.empty(0, 7)).shape == (0,)
