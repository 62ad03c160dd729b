"""Attention is computed once a block where it can be, and never from another block's inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.batches import random_batches
from support.models import CONFIGS, build_model
from support.runs import LAYOUTS
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.architecture import describe, examination
from sparsellm_lightning.calibration import forward


def pruned(name: str, replays: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[dict[str, Any], int]:
    """The pruned weights, and the number of calls of the first block's first attention projection."""
    model = build_model(name)
    if not replays:
        monkeypatch.setattr(examination.Examination, "_replay", lambda self, units: None)
    calls = []
    next(describe(model).blocks[0].projections()).module.register_forward_hook(lambda *_: calls.append(1))
    prune_model(model, random_batches(), PruningConfig(sparsity=0.6, num_calibration_samples=8, **settings))
    return model.state_dict(), len(calls)


@pytest.mark.parametrize(
    ("name", "preset"), [*((name, "paper") for name in LAYOUTS), ("llama", "fast"), ("gemma3", "fast")]
)
def test_replayed_attention_gives_the_same_weights(name: str, preset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"preset": preset, "num_iterations": 2}
    with_replay, few = pruned(name, True, monkeypatch, **settings)
    without, many = pruned(name, False, monkeypatch, **settings)
    assert all(torch.equal(weight, without[key]) for key, weight in with_replay.items())
    assert few < many, "queries are computed less often"


@pytest.mark.parametrize("ignore", [["*.0.mlp.*"], ["*.0.mlp.*", "*.1.self_attn.o_proj"], ["*.self_attn.q_proj"]])
def test_attention_is_not_replayed_from_another_block(ignore: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"preset": "paper", "method": "sparsegpt", "ignore": ignore}
    with_replay, _ = pruned("llama", True, monkeypatch, **settings)
    without, _ = pruned("llama", False, monkeypatch, **settings)
    assert all(torch.equal(weight, without[key]) for key, weight in with_replay.items())


class SequenceFirst(nn.Module):
    """A block whose layers see (sequence, batch, features), as Megatron's do."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.attention = Mean(size)
        self.up, self.down = nn.Linear(size, 2 * size, bias=False), nn.Linear(2 * size, size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(hidden_states)
        return hidden_states + self.down(torch.relu(self.up(hidden_states)))


class Mean(nn.Module):
    """Attends to all tokens before, equally."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.value(x)
        return self.out(values.cumsum(0) / torch.arange(1, len(x) + 1).view(-1, 1, 1))


class OfSequenceFirst(LlamaModel):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutput:  # type: ignore[override]
        hidden = self.embed_tokens(input_ids).transpose(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=self.norm(hidden.transpose(0, 1)))


def test_replay_where_the_sequence_is_the_first_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows a batch, which a reshape in the wrong order would mix."""
    found = []
    for replays in (True, False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIGS["llama"])
        model.model = OfSequenceFirst(CONFIGS["llama"])
        model.model.layers = nn.ModuleList(SequenceFirst() for _ in range(3))
        if not replays:
            monkeypatch.setattr(examination.Examination, "_replay", lambda self, units: None)
        assert all(block.sequence_first and (block.replay is not None) == replays for block in describe(model).blocks)
        config = PruningConfig(preset="paper", method="sparsegpt", sparsity=0.6, num_calibration_samples=8)
        prune_model(model, random_batches(8, 32), config)
        found.append(model.state_dict())
    assert all(torch.equal(weight, found[1][key]) for key, weight in found[0].items())


class InPlace(LlamaDecoderLayer):
    """Adds to its input in place."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states += self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def test_blocks_that_work_in_place() -> None:
    plain, in_place = build_model("llama"), build_model("llama")
    for layer in in_place.model.layers:
        layer.__class__ = InPlace
    for model in (plain, in_place):
        prune_model(model, random_batches(), PruningConfig(preset="paper", sparsity=0.6, num_calibration_samples=8))
    for one, other in zip(plain.parameters(), in_place.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Rope(NamedTuple):
    cos: torch.Tensor
    sin: torch.Tensor


def test_containers_among_the_arguments_of_blocks() -> None:
    """A dict may be where a block leaves something for later ones."""
    store: dict[str, Any] = {}
    recorder = forward._Recorder(describe(build_model("llama")))
    for block in recorder.layout.blocks:
        recorder.call(block, torch.zeros(1, 2, 64), shared=store, rope=Rope(torch.ones(1), torch.ones(1)))
    given = [arguments[0][1] for arguments in recorder.arguments]
    assert all(kwargs["shared"] is store for kwargs in given)
    assert all(isinstance(kwargs["rope"], Rope) for kwargs in given)


def test_stand_ins_are_of_the_class_of_blocks() -> None:
    model = build_model("llama")
    with forward._Recorder(describe(model)).in_place_of_blocks():
        assert all(isinstance(layer, LlamaDecoderLayer) for layer in model.model.layers)
