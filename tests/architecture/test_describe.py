"""What discovery finds, against a table of what is known, and the errors that ``describe`` raises."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.classes import tiny_config, tiny_model
from support.models import VOCABULARY, build_model
from support.runs import block_outputs, make_context
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from sparsellm_lightning import Architecture, PruningConfig, UserError, export_model, load_model, prune_model
from sparsellm_lightning.architecture import (
    Experts,
    Network,
    blocks,
    describe,
    discovery,
    examination,
    find_model,
    table,
)
from sparsellm_lightning.architecture.feed_forward import activations_of
from sparsellm_lightning.calibration import feed_forward_of
from sparsellm_lightning.distributed.sharded import ShardedAdapter

_SEPARATE = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
_LLAMA = (_SEPARATE, {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}, "silu")
_GEMMA = (*_LLAMA[:2], "gelu_tanh")
_OPT = ([_SEPARATE[0], ["self_attn.out_proj"]], {"up": "fc1", "down": "fc2"}, "relu")

EXPECTED: dict[str, tuple[list[list[str]], dict[str, str], str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "opt": _OPT,
    "opt-350m": _OPT,
    "gpt2": ([["attn.c_attn"], ["attn.c_proj"]], {"up": "mlp.c_fc", "down": "mlp.c_proj"}, "gelu_tanh"),
    "gpt_neox": (
        [["attention.query_key_value"], ["attention.dense"]],
        {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        "gelu",
    ),
}
"""By model: projections in front of the feed-forward network by shared input, its projections by role, its activation."""

NOT_ADDED = ("gemma2", "gemma3", "opt-350m")
"""Models that normalise the feed-forward output, or the sum with it."""


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found(name: str) -> None:
    """Projection by projection, in order."""
    model = build_model(name)
    groups, roles, activation = EXPECTED[name]
    layout = describe(model)
    assert len(layout.blocks) == model.config.num_hidden_layers
    for block in layout.blocks:
        assert model.get_submodule(block.name) is block.module
        *linears, network = block.units
        prefix = f"{block.name}."
        assert [[p.name.removeprefix(prefix) for p in unit.projections] for unit in linears] == groups
        assert isinstance(network, Network)
        assert {role: p.name.removeprefix(prefix) for role, p in network.roles.items()} == roles
        assert network.activation.name == activation
        assert network.scale == (None if name in NOT_ADDED else 1.0)
        assert all(model.get_submodule(p.name) is p.module for p in block.projections())
        assert all(p.shape == tuple(p.of(p.parameter).shape) for p in block.projections())
        assert block.dense == {}


@pytest.mark.parametrize("name", ["olmo2", "granite"])
def test_effect_of_the_feed_forward_output(name: str) -> None:
    """A norm behind it gives no factor, a multiplier that factor."""
    config = tiny_config(name)
    if name == "granite":
        config.residual_multiplier = 0.22
    model = AutoModelForCausalLM.from_config(config).eval()
    scales = [network.scale for network in describe(model).networks]
    assert scales == ([None, None] if name == "olmo2" else [pytest.approx(0.22, rel=1e-3)] * 2)


@pytest.mark.parametrize("name", EXPECTED)
def test_additive(name: str) -> None:
    """Where a network has a scale, a change of its output changes the block's output by as much."""
    model = build_model(name)
    layout, batches = describe(model), random_batches()[1:2]
    block = layout.blocks[1]
    before = block_outputs(model, block.module, batches)[0]
    with block.networks[0].output.register_forward_hook(lambda _, args, output: output + 0.5):
        after = block_outputs(model, block.module, batches)[0]
    added = torch.allclose(after - before, torch.tensor(0.5), atol=1e-4)
    assert block.networks[0].scale == (1.0 if added else None)


@torch.no_grad()
def test_fused_matrices_are_solved_as_those_that_they_hold() -> None:
    """Phi-3 with the weights of a LLaMA: bit-equal masks."""
    llama, phi3 = build_model("llama"), build_model("phi3")
    for ours, theirs in zip(phi3.model.layers, llama.model.layers, strict=True):
        attention, network = theirs.self_attn, theirs.mlp
        ours.self_attn.qkv_proj.weight.copy_(
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        )
        ours.self_attn.o_proj.weight.copy_(attention.o_proj.weight)
        ours.mlp.gate_up_proj.weight.copy_(torch.cat([network.gate_proj.weight, network.up_proj.weight]))
        ours.mlp.down_proj.weight.copy_(network.down_proj.weight)
        ours.input_layernorm.weight.copy_(theirs.input_layernorm.weight)
        ours.post_attention_layernorm.weight.copy_(theirs.post_attention_layernorm.weight)
    phi3.model.norm.weight.copy_(llama.model.norm.weight)
    phi3.model.embed_tokens.weight.copy_(llama.model.embed_tokens.weight)
    for model in (llama, phi3):
        prune_model(model, random_batches(), PruningConfig(preset="paper", sparsity=0.6, num_calibration_samples=8))
    for ours, theirs in zip(phi3.model.layers, llama.model.layers, strict=True):
        q, k, v = ours.self_attn.qkv_proj.weight.split([64, 32, 32])
        gate, up = ours.mlp.gate_up_proj.weight.chunk(2)
        pairs = [
            (q, theirs.self_attn.q_proj),
            (k, theirs.self_attn.k_proj),
            (v, theirs.self_attn.v_proj),
            (ours.self_attn.o_proj.weight, theirs.self_attn.o_proj),
            (gate, theirs.mlp.gate_proj),
            (up, theirs.mlp.up_proj),
            (ours.mlp.down_proj.weight, theirs.mlp.down_proj),
        ]
        for weight, module in pairs:
            assert torch.equal(weight == 0, module.weight == 0)


def test_probe_leaves_no_trace() -> None:
    model = build_model("llama").train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    describe(model)
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_found_once_and_bound_to_what_the_model_holds_now() -> None:
    """A second call makes no forward, and sees a layer that was replaced since by one of the same name."""
    model = build_model("llama")
    describe(model)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.model.register_forward_hook(lambda *_: calls.append(1))
    new = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    model.model.layers[0].mlp.up_proj = new
    assert describe(model).blocks[0].networks[0].roles["up"].module is new
    assert not calls
    for layers in (model.model.layers[:2], nn.ModuleList([*model.model.layers, copy.deepcopy(model.model.layers[0])])):
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)
        assert len(describe(model).blocks) == len(layers)


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


def test_rows_override_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "ARCHITECTURES", {})
    for module in (blocks, discovery, examination):
        monkeypatch.setattr(module, "ARCHITECTURES", table.ARCHITECTURES)
    model = build_model("llama")
    row = Architecture(blocks="layers", gate="mlp.up_proj", up="mlp.gate_proj", down="mlp.down_proj")
    table.register_architecture("llama", replace(row, blocks="h"))
    with pytest.raises(UserError, match=r"row for 'llama' must name a list of blocks of LlamaModel, got 'h'"):
        describe(model)
    table.register_architecture("llama", replace(row, blocks="norm"))
    with pytest.raises(UserError, match="list of blocks of LlamaModel, got 'norm'"):
        describe(model)
    table.register_architecture("llama", row)  # gate and up are swapped
    with pytest.raises(UserError, match="does not reproduce"):
        describe(model)
    table.register_architecture("llama", replace(row, down="mlp.no_proj"))
    with pytest.raises(UserError, match=r"names mlp\.no_proj, which model\.layers\.0 does not run"):
        describe(model)
    table.register_architecture("llama", replace(row, gate=row.up, up=row.gate, activation="swiglu"))
    with pytest.raises(UserError, match="must name an activation of transformers, got 'swiglu'"):
        describe(model)
    table.register_architecture("llama", replace(row, gate=row.up, up=row.gate, activation="silu"))
    assert describe(model).blocks[0].networks[0].roles["gate"].name == "model.layers.0.mlp.gate_proj"


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
    with pytest.raises(UserError, match=r"Holder\.student is missing\. Candidates: backbone, inner\.teacher\."):
        find_model(both, "student")
    with pytest.raises(UserError, match=r"Holder\.inner is Holder"):
        find_model(both, "inner")
    with pytest.raises(UserError, match="found none"):
        find_model(Holder(head=nn.Linear(2, 2)))


def test_layers_that_are_left_dense_by_their_calls() -> None:
    """A vector's layer, a weight that a hook computes, and experts that see parts of the tokens: each with its reason."""
    model = build_model("mixtral")
    first, second, third = model.model.layers
    first.mix, first.vector = nn.Linear(64, 64), nn.Parameter(torch.randn(64))
    attention = first.self_attn.forward
    first.self_attn.forward = lambda *args, **kwargs: (first.mix(first.vector), attention(*args, **kwargs))[1]
    nn.utils.prune.l1_unstructured(second.self_attn.o_proj, "weight", 0.1)
    mixture = third.mlp.forward
    third.mlp.forward = lambda hidden: torch.cat([mixture(part.contiguous()) for part in hidden.split(4, 1)], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = describe(model).blocks
    assert found[0].dense["model.layers.0.mix"] == "it has no row for each token"
    assert "more than a product" in found[1].dense["model.layers.1.self_attn.o_proj"]
    assert "no row for each token" in found[2].dense["model.layers.2.mlp.experts"]
    assert not any(isinstance(unit, Experts) for unit in found[2].units)
    assert any(isinstance(unit, Experts) for unit in found[1].units)


def test_configurations_with_other_heads_by_layer() -> None:
    """transformers refuses to name one number for all."""

    class Ambiguous(type(build_model("llama").config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> object:
            if name == "num_attention_heads" and super().__getattribute__("__dict__").get("by_layer"):
                raise RuntimeError("ambiguous")
            return super().__getattribute__(name)

    model = build_model("llama")
    model.config.__class__ = Ambiguous
    model.config.__dict__["by_layer"] = True
    assert len(list(describe(model).projections())) == 3 * 7


def test_weights_that_cannot_be_pruned_are_refused() -> None:
    tied = build_model("llama")
    tied.model.layers[2].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    names = r"model\.layers\.1\.mlp\.up_proj\.weight and model\.layers\.2\.mlp\.up_proj\.weight are one parameter"
    with pytest.raises(UserError, match=names):
        describe(tied)
    assert describe(tied, PruningConfig(ignore=["up_proj"])).blocks, "left dense, they may be one"
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is on the meta device"):
        describe(meta)
    quantised = build_model("llama")
    quantised.is_quantized = True
    with pytest.raises(UserError, match="not quantised"):
        describe(quantised)


def test_the_text_decoder_of_an_image_model() -> None:
    """The tower for images and the projector stay dense."""
    model = tiny_model("gemma3")
    layout = describe(model)
    assert len(layout.blocks) == 2
    assert all(p.name.startswith("model.language_model.layers.") for p in layout.projections())


@pytest.mark.parametrize(("name", "parts"), [("phi3", (64, 32, 32)), ("gpt2", (64, 64, 64)), ("gpt_neox", ())])
def test_queries_keys_and_values_in_one_matrix(name: str, parts: tuple[int, ...]) -> None:
    """One behind the other they are solved as three matrices. GPT-NeoX mixes them head by head."""
    first = next(describe(build_model(name)).blocks[0].projections())
    assert first.parts == parts


def test_layers_without_a_feed_forward_network() -> None:
    """Mamba's are solved one by one. What no forward calls is named."""
    layout = describe(tiny_model("mamba"))
    for block in layout.blocks:
        assert not block.networks
        assert [p.name.rpartition(".")[2] for p in block.projections()] == ["in_proj", "x_proj", "out_proj"]
        assert block.dense == {f"{block.name}.mixer.dt_proj": "no forward calls it"}


@pytest.mark.parametrize(
    ("model_type", "more", "message"),
    [
        ("xlm", {}, "gets other hidden states"),
        (
            "zaya",
            {"num_hidden_layers": 4},
            "gets more than hidden states from the blocks before it: an argument without a name",
        ),
    ],
)
def test_links_between_blocks_that_calibration_leaves_out(model_type: str, more: dict[str, int], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        describe(tiny_model(model_type, **more))


def test_blocks_that_do_not_run_without_those_before_are_refused() -> None:
    """GLM's sparse attention may take the tokens that an earlier block has chosen."""
    model = tiny_model("glm_moe_dsa", indexer_types=["full", "shared"])
    with pytest.raises(
        UserError, match=r"layers\.1 of GlmMoeDsaForCausalLM needs prev_topk_indices from the blocks before"
    ):
        describe(model)


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe"])
def test_routers_of_experts_that_are_not_found_stay_dense(model_type: str) -> None:
    layout = describe(tiny_model(model_type))
    assert all(p.shape[0] != 4 for p in layout.projections())
    assert examination.ROUTES in layout.blocks[0].dense.values()


def test_weights_that_evaluation_changes(tmp_path: Path) -> None:
    """RWKV divides those of later blocks by powers of two, once in every process that evaluates it."""
    with pytest.raises(UserError, match=r"rescale_every, which is 6, to 0"):
        describe(tiny_model("rwkv", num_hidden_layers=8))
    model = tiny_model("rwkv", num_hidden_layers=8, rescale_every=0)
    ids = torch.arange(32).view(2, 16)
    prune_model(model, [ids], PruningConfig(preset="paper", method="magnitude", num_calibration_samples=2))
    loaded = load_model(str(export_model(model, tmp_path / "out"))).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_ordinary_links_between_blocks() -> None:
    for name in ("llama", "gemma3", "opt-350m", "gpt2", "mixtral"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            describe(build_model(name))


def test_a_shared_expert_that_is_narrow_is_no_router() -> None:
    """As wide as there are experts. Its gate stays dense; the router is no linear layer."""
    config = Qwen2MoeConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 16,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
        },
        **{"num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
    )
    torch.manual_seed(0)
    (block,) = describe(Qwen2MoeForCausalLM(config)).blocks
    assert {name.rpartition("mlp.")[2] for name in block.dense} == {"shared_expert_gate"}


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.25 * super().forward(x)


def test_layers_that_compute_more_than_a_product_stay_dense() -> None:
    model = build_model("llama")
    model.model.layers[0].mlp.down_proj.__class__ = Scaled
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.q_proj)
    first, second, third = describe(model).blocks
    reason = "it computes more than a product with its weight"
    assert first.dense == {"model.layers.0.mlp.down_proj": reason}
    assert second.dense == {"model.layers.1.self_attn.q_proj": reason}
    assert not third.dense
    assert not first.networks
    assert len(second.networks) == len(third.networks) == 1


def test_no_part_of_a_router_is_pruned() -> None:
    """ZAYA's have several layers, one of which looks like a feed-forward network."""
    layout = describe(tiny_model("zaya"))
    assert not [p.name for p in layout.projections() if ".mlp.gate." in p.name]
    assert any(".mlp.gate." in name for block in layout.blocks for name in block.dense)


def test_narrow_layers_of_a_block_that_holds_experts_are_no_routers() -> None:
    more = {"enable_moe_block": True, "num_experts": 32, "top_k_experts": 2, "moe_intermediate_size": 32}
    block = describe(tiny_model("gemma4_text", **more, num_key_value_heads=1)).blocks[0]
    assert any(p.name.endswith("k_proj") for p in block.projections())
    assert any("router" in name for name in block.dense)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v4"])
def test_experts_are_known_where_they_clamp(model_type: str) -> None:
    """The tokens of the probe are too small to show it."""
    units = (unit for block in describe(tiny_model(model_type)).blocks for unit in block.units)
    found = next(unit for unit in units if isinstance(unit, Experts))
    generator = torch.Generator().manual_seed(0)
    d, experts = found.networks[0].roles["up"].shape[1], len(found.networks)
    x = 1000 * torch.randn(32, d, generator=generator)
    chosen, weights = torch.arange(64).view(32, 2) % experts, torch.full((32, 2), 0.5)
    context = make_context(tiny_model(model_type), PruningConfig(preset="paper"))
    with torch.no_grad():
        expected = found.observed(x, chosen, weights)
        total = torch.zeros_like(expected)
        for index, network in enumerate(found.networks):
            total += feed_forward_of(context, network)(x) * (weights * (chosen == index)).sum(1, keepdim=True)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_shared_experts_are_known_where_they_clamp() -> None:
    model = tiny_model("deepseek_v4")
    network = next(unit for block in describe(model).blocks for unit in block.units if isinstance(unit, Network))
    shared = model.get_submodule(network.roles["down"].name.rpartition(".")[0])
    x = 1000 * torch.randn(32, network.roles["up"].shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = shared(x)
        assert float((shared.up_proj(x)).abs().max()) > shared.limit
        found = feed_forward_of(make_context(model, PruningConfig(preset="paper")), network)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_activations_with_parameters_are_not_tried() -> None:
    """A new one has other parameters than the model's, and lies on another device."""
    functions = [a.function for a in activations_of(tiny_config("apertus"))]
    assert not any(isinstance(f, nn.Module) and any(True for _ in f.parameters()) for f in functions)


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM has none .*ignore names all: \*"):
        prune_model(build_model("llama"), random_batches(), PruningConfig(ignore=["*"]))
    model = build_model("llama")
    for block in model.model.layers:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                prune.l1_unstructured(module, "weight", 0.5)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has none .*it computes more than a product with its weight"):
        prune_model(model, random_batches(), PruningConfig())


@pytest.mark.parametrize("given", [{"up": "a"}, {"down": "a"}, {"gate": "a", "up": "b"}, {"activation": "silu"}])
def test_half_a_row_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="Give up and down too"):
        Architecture(**given)  # type: ignore[arg-type]


def test_a_forward_through_the_root_gives_shared_blocks_whole_windows() -> None:
    """The later blocks of Gemma 4 take keys and values of earlier ones. With few logits they would get few positions."""

    class Root(ShardedAdapter):
        def _through_root(self, call: Any) -> Any:
            return call()

    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2}
    model = tiny_model("gemma4_text", **layers, global_head_dim=16).eval()
    seen: list[int] = []
    model.model.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        Root().run_model(model, {"input_ids": torch.ones(2, 9, dtype=torch.long)})
    assert seen == [9]
