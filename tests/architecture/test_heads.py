"""Attention whose heads can leave: proved by moving them, for grouped, multi-head and multi-query attention."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import CONFIGS, SIZES, VOCABULARY, build_model
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, LlamaConfig, Olmo2Config

from sparsellm_lightning.architecture import describe


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "opt", "gpt2", "phi3", "mixtral"])
def test_heads_are_found(name: str) -> None:
    layout = describe(build_model(name))
    config = CONFIGS[name]
    groups = getattr(config, "num_key_value_heads", 4)
    for block in layout.blocks:
        attention = block.attention
        assert attention is not None
        assert (attention.heads, attention.groups, attention.head_size) == (4, groups, 16)
        starts = [first for _, first in attention.inputs]
        assert starts == {"gpt2": [0, 64, 128], "phi3": [0, 64, 96]}.get(name, [0, 0, 0])
    assert layout.heads == groups


def test_queries_alone_leave_where_all_share_one_key_value_head() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=16)).eval()
    (first, _) = describe(model).blocks
    assert first.attention is not None
    assert (first.attention.groups, first.attention.removable) == (1, 4)
    assert [p.name.rpartition(".")[2] for p, _, _ in first.attention.spans()] == ["q_proj"]


@pytest.mark.parametrize(
    "config",
    [
        Olmo2Config(**SIZES, num_key_value_heads=2),  # a norm over all heads
        BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),  # a bias for each head (ALiBi)
        FalconConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=False
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_that_cannot_leave(config: Any) -> None:
    assert describe(AutoModelForCausalLM.from_config(config).eval()).heads == 0
