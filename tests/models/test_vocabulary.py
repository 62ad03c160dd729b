"""Samples of a vocabulary, against sums over all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import VOCABULARY, build_model
from torch import Tensor

from sparsellm_lightning.models import VocabularySample, can_sample, likely_tokens, vocabulary


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_sample_stands_for_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over samples of Σ exp(a + log w) is the sum over all tokens, and one sample is near it."""
    monkeypatch.setattr(vocabulary, "LIKELY", 5)
    monkeypatch.setattr(vocabulary, "OTHERS", 100)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 1000, generator=generator)
    likely = likely_tokens(logits)
    by_hand = {token for row in logits.tolist() for token in sorted(range(1000), key=lambda v: -row[v])[:5]}
    assert set(likely.nonzero().flatten().tolist()) == by_hand
    samples = [VocabularySample.draw(likely, generator) for _ in range(400)]
    for sample in samples:
        drawn = sample.tokens[len(by_hand) :]
        assert set(sample.tokens[: len(by_hand)].tolist()) == by_hand
        assert len(set(drawn.tolist()) - by_hand) == 100
        assert sample.log_weights[: len(by_hand)].eq(0).all()
    sums = torch.stack([(logits[:, s.tokens] + s.log_weights).exp().sum(-1) for s in samples])
    wanted = logits.exp().sum(-1)
    torch.testing.assert_close(sums.mean(0), wanted, rtol=0.02, atol=0)
    assert not torch.equal(samples[0].tokens, samples[1].tokens)


@pytest.mark.parametrize(("likely", "others"), [(1000, 4), (5, 1000)])
def test_a_sample_of_all_tokens_is_the_vocabulary(likely: int, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LIKELY", likely)
    monkeypatch.setattr(vocabulary, "OTHERS", others)
    generator = torch.Generator().manual_seed(0)
    sample = VocabularySample.draw(likely_tokens(torch.randn(3, 50, generator=generator)), generator)
    assert sorted(sample.tokens.tolist()) == list(range(50))
    assert sample.log_weights.eq(0).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])  # gemma2 caps its logits; gpt2 shares head and embeddings
def test_the_head_gives_logits_of_the_sample(name: str, ids: Tensor) -> None:
    model = build_model(name)
    weight = model.get_output_embeddings().weight
    sample = VocabularySample(torch.tensor([300, 7, 12]), torch.zeros(3))
    with torch.no_grad():
        whole = model(ids).logits
        with sample.in_head(model):
            some = model(ids).logits
        with pytest.raises(KeyError), sample.in_head(model):
            raise KeyError
        again = model(ids).logits
    torch.testing.assert_close(some, whole[..., [300, 7, 12]])
    assert torch.equal(again, whole)
    assert model.get_output_embeddings().weight is weight


@pytest.mark.parametrize("others", [4, VOCABULARY // 2])
def test_where_a_sample_can_be_taken(others: int, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a small vocabulary, a head with a bias, nor where code behind the head knows the tokens' numbers."""
    monkeypatch.setattr(vocabulary, "OTHERS", others)
    model = build_model("llama")

    def logits() -> Tensor:
        found: Tensor = model(ids).logits
        return found

    def masked(tokens: list[int]) -> Tensor:
        found = logits()
        found[..., tokens] = torch.finfo(found.dtype).min
        return found

    assert can_sample(model, logits) == (others == 4)
    assert not can_sample(model, lambda: masked([8]))
    assert not can_sample(model, lambda: masked([300]))
    assert not can_sample(model, lambda: logits().log_softmax(-1))
    assert not can_sample(model, lambda: logits() + torch.ones(VOCABULARY))
    head: Any = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.ones(VOCABULARY))
    assert not can_sample(model, logits)
