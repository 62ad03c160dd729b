"""Patterns of several shares, and budgets that are divided over units, heads and blocks."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.batches import random_batches
from support.models import VOCABULARY, build_model
from support.runs import calibration_batches, make_context
from support.training import OwnModule, exported_smaller, trainer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GraniteMoeSharedConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sparsellm_lightning import PruningConfig, SparseLLMCallback, UserError, perplexity, prune_model
from sparsellm_lightning.allocation import choose_shrinkage, shrinkage
from sparsellm_lightning.allocation.divergence import OutputProbe
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.calibration import capture
from sparsellm_lightning.callbacks import exporting
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.models import Shrinkage, check_shrinkable, shrink
from sparsellm_lightning.pipeline import sequential
from sparsellm_lightning.pipeline.kept import memory_of_tuning

ENDS = ("o_proj", "down_proj")
SETTINGS: dict[str, Any] = {
    "round_to": 16,
    "num_calibration_samples": 8,
    "reconstruction_steps": 3,
    "distillation_steps": 2,
}


def block_parameters(model: PreTrainedModel) -> int:
    return sum(p.size for p in describe(model).projections())


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("llama", {"neurons": 0.25, "heads": 0.5, "blocks": 1}),
        ("llama", {"parameters": 0.6}),
        ("llama", {"latency": 0.6}),
        ("gemma3", {"neurons": 0.5, "heads": 0, "blocks": 0.3}),
        ("gemma3", {"parameters": 0.5}),
        ("phi3", {"neurons": 0.5, "heads": 0.5}),
        ("gpt2", {"parameters": 0.7}),  # its heads cannot leave
        ("opt-350m", {"parameters": 0.8}),  # nor can blocks with a norm behind the sum
        ("mixtral", {"parameters": 0.6}),  # nor experts' units
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}{v:g}" for k, v in value.items()),
)
def test_the_export_is_smaller_and_gives_the_same_logits(
    name: str, pattern: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinkage, "_seconds", lambda *_: [shrinkage.Cost(8, 1, 1)] * 3)
    model, dense = build_model(name), build_model(name)
    smaller, _ = exported_smaller(model, tmp_path / "out", name == "llama", **SETTINGS, pattern=pattern)
    found, full = describe(smaller), describe(dense)
    share = block_parameters(smaller) / block_parameters(dense)
    if "parameters" in pattern:
        assert 0.6 * pattern["parameters"] < share <= pattern["parameters"]
    else:
        assert share < 1
    if "neurons" in pattern:
        assert found.units == round((1 - pattern["neurons"]) * full.units / 16) * 16
        attentions = [model.blocks[0].attention for model in (found, full)]
        assert attentions[0] is not None
        assert attentions[1] is not None
        assert attentions[0].groups == round((1 - pattern.get("heads", 0)) * attentions[1].groups)
        gone = pattern.get("blocks", 0)
        assert len(found.blocks) == len(full.blocks) - (gone if gone >= 1 else round(gone * len(full.blocks)))


def test_a_budget_is_spent_on_what_matters_least(
    trained: Callable[[str], PreTrainedModel], text: TextDataModule
) -> None:
    """The mixture loses no more than any single pattern with as few parameters."""
    dense, lost = perplexity(trained("llama"), text.val_dataloader()), {}
    patterns: dict[str, dict[str, float]] = {
        "budget": {"parameters": 0.7},
        "neurons": {"neurons": 0.47},
        "heads": {"heads": 0.5, "neurons": 0.22},
        "blocks": {"blocks": 1},
    }
    for name, pattern in patterns.items():
        model = trained("llama")
        config = PruningConfig(pattern=pattern, round_to=4, preset="paper", num_calibration_samples=128)
        prune_model(model, text.train_dataloader(), config)
        lost[name] = math.log(perplexity(model, text.val_dataloader()) / dense)
    assert lost["budget"] <= 1.01 * min(lost["neurons"], lost["heads"], lost["blocks"])


def test_a_budget_leaves_the_model_as_it_was_until_it_is_spent() -> None:
    model = build_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = make_context(model, PruningConfig(**SETTINGS, pattern={"parameters": 0.6}))
    windows = calibration_batches(random_batches())
    with torch.no_grad():
        choose_shrinkage(context, capture(context, windows, 8), windows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({}, "pattern must give neurons, heads and blocks"),
        ({"neurons": 0.2, "parameters": 0.5}, "pattern must give neurons, heads and blocks"),
        ({"layers": 0.2}, "pattern's names must be one of neurons, heads, blocks, parameters, latency, got 'layers'"),
        ({"neurons": 1.5}, "neurons must be a share below 1, got 1.5"),
        ({"blocks": 2.5}, "blocks must be a share below 1 or a number of blocks, got 2.5"),
        ({"parameters": 0}, "parameters must be a share below 1, got 0"),
        ("layers", "pattern must be 'unstructured', 'neurons', 'heads', 'blocks', kept:group"),
    ],
)
def test_patterns_that_are_none(pattern: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruningConfig(pattern=pattern)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"gives the shares, got sparsity 0\.5 too"):
        PruningConfig(pattern={"neurons": 0.2}, sparsity=0.5)
    with pytest.raises(UserError, match=r"keep some of 3 blocks and remove some, but 3 blocks keep"):
        describe(build_model("llama"), PruningConfig(pattern={"blocks": 3}))
    with pytest.raises(UserError, match=r"no mixture brings LlamaForCausalLM to 0\.01 of its parameters"):
        prune_model(build_model("llama"), random_batches(), PruningConfig(**SETTINGS, pattern={"parameters": 0.01}))


def test_shares_of_0_remove_nothing() -> None:
    model = build_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_model(model, random_batches(), PruningConfig(**SETTINGS, pattern={"neurons": 0.0, "heads": 0}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_seconds_of_units_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only these modules move: three projections of units by 1, four of heads by a quarter, a block by 2."""
    model, time = build_model("llama"), [0.0]

    def moving(module: torch.nn.Module, seconds: float) -> Callable[..., Any]:
        forward = module.forward

        def moved(*args: Any, **kwargs: Any) -> Any:
            time[0] += seconds
            return forward(*args, **kwargs)

        return moved

    context = make_context(model, PruningConfig(preset="paper", pattern={"latency": 0.6}))
    with torch.no_grad():
        cache = capture(context, calibration_batches(random_batches()), 8)
        for layer in model.model.layers:
            layer.forward = moving(layer, 2.0)
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.forward = moving(module, 1.0 if module in set(layer.mlp.modules()) else 0.25)
        monkeypatch.setattr(shrinkage.time, "perf_counter", lambda: time[0])
        assert shrinkage._seconds(context, cache) == [shrinkage.Cost(3, 1, 2)] * 3


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_latency_is_met_and_not_by_far(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PruningConfig(preset="paper", pattern={"latency": share}, round_to=16, num_calibration_samples=8)
    context, batches = make_context(build_model("llama"), config), calibration_batches(random_batches())
    monkeypatch.setattr(shrinkage, "_seconds", lambda context, sample: [shrinkage.Cost(8, 1, 1)] * 3)
    with torch.no_grad():
        found = choose_shrinkage(context, capture(context, batches, 8), batches)
    layout = context.layout

    def cost(units: int) -> float:
        heads = layout.heads if found.heads is None else found.heads
        return (3 - len(found.blocks)) * shrinkage.Cost(8, 1, 1).of(units / layout.units, heads / layout.heads)

    units = layout.units if found.units is None else found.units
    assert cost(units) <= share * 30
    assert units == layout.units or cost(units + 16) > share * 30


def test_damages_are_those_of_all_blocks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the measured number: the divergence of a plain forward in which every block lacks its units, or its heads."""
    model, dense = build_model("llama"), build_model("llama")
    context = make_context(
        model, PruningConfig(preset="paper", pattern={"parameters": 0.5}, solver_precision="float32")
    )
    ids = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(3))
    batches = calibration_batches([{"input_ids": ids}])
    measured = OutputProbe.divergence
    together: dict[str, float] = {}

    def divergence(probe: OutputProbe, block: Any, *args: Any) -> float:
        weights = [
            [p.matrix for p in b.projections() if p.name.endswith(end)] for b in context.layout.blocks for end in ENDS
        ]
        empty = [bool((matrix == 0).all(0).any()) for (matrix,) in weights]
        for kind, lacking in (("units", empty[1::2]), ("heads", empty[::2])):
            if all(lacking):
                with torch.no_grad():
                    p, q = (m(ids).logits.log_softmax(-1) for m in (dense, model))
                together[kind] = float((p.exp() * (p - q)).sum(-1).mean())
        return measured(probe, block, *args)

    monkeypatch.setattr(OutputProbe, "divergence", divergence)
    units, heads = shrinkage._damages(context, capture(context, batches, 4), batches, 0.5)
    assert units(64) == pytest.approx(together["units"], rel=0.02)
    assert heads(1) == pytest.approx(together["heads"], rel=0.02)
    assert (units(0), heads(0)) == (0, 0)
    assert 0 < units(32) < units(64) < units(96)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_budget_where_heads_and_units_cannot_leave(share: float) -> None:
    """Two kinds of blocks, of which one has no attention: its parameters stay, and count."""
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            block_auto_adjust_ff_dim=False,
            layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
        )
    ).eval()
    layout = describe(model)
    assert layout.heads == 0

    def size(of: PreTrainedModel) -> int:
        return sum(p.numel() for p in of.model.layers.parameters() if p.dim() == 2)  # type: ignore[operator, union-attr]

    dense = size(model)
    assert dense == block_parameters(model)
    config = PruningConfig(pattern={"parameters": share}, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune_model(model, random_batches(), config)
    assert size(shrink(describe(model, config), config).model) <= share * dense


def test_memory_of_distillation() -> None:
    """24 bytes for each kept weight. Where blocks leave, how many are kept is not known before, so all count."""
    layout = describe(build_model("llama"))
    _, zeros = memory_of_tuning(layout.blocks, PruningConfig(sparsity=0.0))
    _, half = memory_of_tuning(layout.blocks, PruningConfig(sparsity=0.5))
    assert half == zeros - 12 * sum(p.size for p in layout.projections())
    _, blocks = memory_of_tuning(layout.blocks, PruningConfig(pattern={"blocks": 1}))
    assert blocks == zeros == 24 * sum(p.numel() for b in layout.blocks for p in b.module.parameters())


def test_ignored_projections_cannot_stay_where_blocks_leave() -> None:
    for pattern in ("blocks", {"parameters": 0.7}, {"neurons": 0.2, "blocks": 1}):
        with pytest.raises(UserError, match="Leave ignore out"):
            PruningConfig(pattern=pattern, ignore=["layers.0.mlp.down_proj"])


LFM2 = Lfm2Config(
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 96, "block_multiple_of": 16},
    **{"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2},
    layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
)
"""The width of its feed-forward networks is in no setting."""
SHARED = GraniteMoeSharedConfig(
    **{"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 32, "shared_intermediate_size": 64},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_local_experts": 4, "num_experts_per_tok": 2},
)
BLOOM = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=4)


@pytest.mark.parametrize(("settings", "share"), [(LFM2, 0.75), (SHARED, 0.7), (BLOOM, 0.7)])
def test_a_budget_that_only_blocks_meet(settings: PretrainedConfig, share: float, tmp_path: Path) -> None:
    """What stays whole asks nothing of the configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(2))
    more: dict[str, Any] = {"pattern": {"parameters": share}, "round_to": 16, "num_calibration_samples": 8}
    pruner = SparseLLMCallback(preset="paper", **more, measure=False, export_dir=str(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(pruner).fit(OwnModule(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert smaller.config.num_hidden_layers < settings.num_hidden_layers
    assert smaller.config.pad_token_id == settings.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_small_blocks_may_leave_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = [2, 4, 1, 3]  # those with attention are smaller
    monkeypatch.setattr(shrinkage, "choose_blocks", lambda c, cache, b, number: dict.fromkeys(order[:number], 0.0))
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(LFM2).eval()
    context = make_context(model, PruningConfig(preset="paper", pattern={"parameters": 0.6}, round_to=16))
    windows = calibration_batches(random_batches())
    with torch.no_grad():
        found = choose_shrinkage(context, capture(context, windows, 8), windows)
    assert found.blocks == {2, 4, 1}


def test_lists_of_indices_follow_the_blocks() -> None:
    config = Llama4TextConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 64},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"num_local_experts": 4, "no_rope_layers": [1, 1, 1, 1]},
    )
    check_shrinkable(describe(Llama4ForCausalLM(config).eval()), Shrinkage(blocks=frozenset({1})))


def test_a_model_that_cannot_be_made_smaller_at_the_end_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise UserError("No configuration.")

    monkeypatch.setattr(exporting, "shrink", refuse)
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(2))
    pruner = SparseLLMCallback(**SETTINGS, pattern={"neurons": 0.25}, export_dir=str(tmp_path / "out"), measure=False)
    model = build_model("llama")
    trainer(pruner).fit(OwnModule(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("pattern", [{"neurons": 0.25, "blocks": 1}, {"heads": 0.5, "blocks": 1}, {"parameters": 0.6}])
def test_a_run_that_makes_a_smaller_model_is_resumed(
    pattern: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in blocks that have left, which are zeros then, is found all the same."""
    chosen = Shrinkage(units=96, blocks=frozenset({1}))
    if "parameters" in pattern:
        monkeypatch.setattr(sequential, "choose_shrinkage", lambda *_: chosen)
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(2))

    def run(steps: int, **more: Any) -> tuple[pl.Trainer, OwnModule]:
        settings: dict[str, Any] = {"preset": "paper", "method": "wanda", "round_to": 16, "num_calibration_samples": 4}
        held = SparseLLMCallback(**settings, pattern=pattern, finetune=True, measure=False, **more)
        return trainer(held, max_steps=steps), OwnModule(build_model("llama"))

    first, module = run(1)
    first.fit(module, DataLoader(ids, batch_size=8))  # type: ignore[arg-type]
    first.save_checkpoint(tmp_path / "a.ckpt")
    second, module = run(2, export_dir=str(tmp_path / "out"))
    second.fit(module, DataLoader(ids, batch_size=8), ckpt_path=tmp_path / "a.ckpt", weights_only=False)  # type: ignore[arg-type]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.config.num_hidden_layers == 2
    assert written.config.intermediate_size == (128 if "heads" in pattern else 96)
    assert written.config.num_key_value_heads == (1 if "heads" in pattern else 2)
    report = json.loads((tmp_path / "out/pruning_report.json").read_text())
    assert report["sparsity"]["exported"] == 0
    (gone,) = report["removed_blocks"]
    assert [block["index"] for block in report["blocks"]] == [0, 1]
    assert 0 <= gone < 3
