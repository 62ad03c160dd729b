"""Continuations, against ``generate`` of transformers."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, build_model

from sparsellm_lightning.models import continued, first_prompts


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_likeliest_tokens(name: str) -> None:
    model = build_model(name)
    model.generation_config.eos_token_id = None
    prompts = torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.generate(prompts, max_new_tokens=9, do_sample=False)
    before = torch.get_rng_state()
    assert torch.equal(continued(model, prompts, 9), expected[:, 7:])
    assert torch.equal(torch.get_rng_state(), before)


def test_first_prompts() -> None:
    batches = [{"input_ids": torch.arange(20).view(2, 10)}, {"input_ids": torch.arange(20, 40).view(2, 10)}]
    prompts = first_prompts(batches, 3, 4)
    assert prompts is not None
    assert prompts.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]
    assert first_prompts(batches, 3, 11) is None
    assert first_prompts([], 3, 4) is None
    assert first_prompts([{"inputs_embeds": torch.zeros(1, 10, 4)}], 3, 4) is None
    padded = {"input_ids": torch.arange(10)[None], "attention_mask": torch.tensor([[0] * 3 + [1] * 7])}
    assert first_prompts([padded], 3, 4) is None
