"""The head alone, in another dtype."""

from __future__ import annotations

import pytest
import torch
from support.batches import random_batches
from support.models import build_model

from sparsellm_lightning.models import head_in


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt-350m"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_rounded_head_gives_the_logits_of_autocast(name: str, tied: bool) -> None:
    model = build_model(name)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not tied:
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.3)
    else:
        head.weight = embeddings.weight
    before, batch = head.weight, random_batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        with head_in(model, torch.bfloat16):
            assert head.weight.dtype == torch.bfloat16
            assert embeddings.weight.dtype == torch.float32
            assert torch.equal(model(**batch).logits, expected)
    assert head.weight is before
    with head_in(model, None):
        assert head.weight is before


def test_the_weight_comes_back_after_an_error() -> None:
    model = build_model("llama")
    before = model.get_output_embeddings().weight
    with pytest.raises(KeyError), head_in(model, torch.bfloat16):
        raise KeyError
    assert model.get_output_embeddings().weight is before
