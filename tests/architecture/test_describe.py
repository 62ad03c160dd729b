"""The table of architectures, against plain ``transformers``, and the errors that ``describe`` raises."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import CONFIGS, build_model
from support.runs import block_outputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning import Architecture, PruningConfig, UserError, prune_model
from sparsellm_lightning.architecture import Block, Projection, describe, find_model, table


def inputs_and_outputs(model: nn.Module, block: Block) -> list[tuple[Projection, Tensor, Tensor]]:
    """The block's projections in the order in which plain ``transformers`` calls them, with their inputs and outputs."""
    calls: list[tuple[Projection, Tensor, Tensor]] = []

    def see(p: Projection) -> Any:
        return p.module.register_forward_hook(lambda _, args, output: calls.append((p, args[0], output)))

    handles = [see(p) for p in block.projections()]
    with torch.no_grad():
        model(**random_batches()[1])
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_the_table(name: str) -> None:
    """Each block holds all linear layers, in groups of one input, and its feed-forward network is the row's function."""
    model = build_model(name)
    layout = describe(model)
    linear = {
        child
        for path, child in model.named_modules()
        if isinstance(child, (nn.Linear, Conv1D)) and any(part.isdigit() for part in path.split("."))
    }
    assert {p.module for p in layout.projections()} == linear
    assert len(layout.blocks) == model.config.num_hidden_layers
    for block in (layout.blocks[0], layout.blocks[-1]):
        assert model.get_submodule(block.name) is block.module
        calls = inputs_and_outputs(model, block)
        position = {p.name: number for number, (p, _, _) in enumerate(calls)}
        given = {p.name: (x, y) for p, x, y in calls}
        groups = [sorted(position[p.name] for p in group) for group in block.groups]
        assert [number for group in groups for number in group] == list(range(len(calls))), "order of evaluation"
        for group in block.groups:
            assert all(torch.equal(given[p.name][0], given[group[0].name][0]) for p in group), "one input"
            assert all(p.shape == (given[p.name][1].shape[-1], given[p.name][0].shape[-1]) for p in group)
        up, down = (given[block.feed_forward[role].name] for role in ("up", "down"))
        gate = given[block.feed_forward["gate"].name][1] if "gate" in block.feed_forward else None
        hidden = layout.activation(up[1]) if gate is None else layout.activation(gate) * up[1]
        torch.testing.assert_close(hidden, down[0].view_as(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_additive(name: str) -> None:
    """Where a layout is additive, a change of the down projection's output changes the block's output by as much."""
    model = build_model(name)
    layout, batches = describe(model), random_batches()[1:2]
    block = layout.blocks[1]
    before = block_outputs(model, block.module, batches)[0]
    with block.feed_forward["down"].module.register_forward_hook(lambda _, args, output: output + 0.5):
        after = block_outputs(model, block.module, batches)[0]
    assert torch.allclose(after - before, torch.tensor(0.5), atol=1e-4) == layout.additive
    assert layout.additive == (name not in ("gemma2", "gemma3", "opt-350m"))


def test_ignore() -> None:
    """Patterns match the whole name or its tail."""
    config = PruningConfig(ignore=["down_proj", "model.layers.0.self_attn.*", "1.mlp.up_proj"])
    layout = describe(build_model("llama"), config)
    ignored = {p.name for p in layout.projections() if not p.pruned}
    attention = {f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"}
    assert ignored == {f"model.layers.{i}.mlp.down_proj" for i in range(3)} | attention | {"model.layers.1.mlp.up_proj"}


def test_settings_that_do_not_fit_the_model() -> None:
    model = build_model("llama")
    with pytest.raises(UserError, match=r"no_such_proj.*match none"):
        describe(model, PruningConfig(preset="paper", ignore=["no_such_proj"]))
    with pytest.raises(UserError, match=r"divide by 7.*self_attn.q_proj \(64\)"):
        describe(model, PruningConfig(preset="paper", pattern="3:7"))
    with pytest.raises(UserError, match="alternation_blocks"):
        describe(model, PruningConfig(preset="paper", alternation_blocks=[3]))


def test_unknown_architecture_and_new_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = build_model("llama"), random_batches()
    rows = {name: row for name, row in table.ARCHITECTURES.items() if name != "llama"}
    monkeypatch.setattr(table, "ARCHITECTURES", rows)
    with pytest.raises(UserError, match=r"'llama' is not in the table.*gpt2.*register_architecture"):
        describe(model)
    row = Architecture(
        blocks="layers",
        attention=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
        gate="mlp.up_proj",
        up="mlp.gate_proj",
        down="mlp.down_proj",
    )
    table.register_architecture("llama", Architecture(**{**vars(row), "blocks": "h"}))
    with pytest.raises(UserError, match=r"row for 'llama' names 'h'"):
        describe(model)
    table.register_architecture("llama", row)  # gate and up are swapped
    for method in ("sparsellm", "sparsegpt"):
        config = PruningConfig(preset="paper", method=method, num_calibration_samples=8)
        with pytest.raises(UserError, match="does not reproduce"):
            prune_model(copy.deepcopy(model), batches, config)
    table.register_architecture("llama", Architecture(**{**vars(row), "gate": row.up, "up": row.gate}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(model, batches, PruningConfig(preset="paper", num_calibration_samples=8))


class Holder(nn.Module):
    """A module with the children that it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_find_model() -> None:
    one, other = build_model("llama"), build_model("llama", seed=1)
    assert find_model(one) is one
    assert find_model(Holder(backbone=one)) is one
    both = Holder(backbone=one, inner=Holder(teacher=other))
    with pytest.raises(UserError, match=r"found backbone, inner\.teacher.*model_attribute"):
        find_model(both)
    assert find_model(both, "inner.teacher") is other
    with pytest.raises(UserError, match=r"Holder\.student is missing"):
        find_model(both, "student")
    with pytest.raises(UserError, match=r"Holder\.inner is Holder"):
        find_model(both, "inner")
    with pytest.raises(UserError, match="found none"):
        find_model(Holder(head=nn.Linear(2, 2)))
