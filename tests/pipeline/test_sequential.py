"""Block after block through a model, against plain ``transformers``."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.classes import tiny_model
from support.models import CONFIGS, VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import (
    LAYOUTS,
    assert_same_hidden,
    block_inputs,
    block_outputs,
    calibration_batches,
    make_context,
    prune_blocks,
    state_of,
    tune_with,
)
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sparsellm_lightning import NumericalError, PruningConfig, UserError, perplexity, prune_model
from sparsellm_lightning.architecture import ARCHITECTURES, Architecture, Block, describe
from sparsellm_lightning.calibration import ActivationCache, Context
from sparsellm_lightning.pipeline import admission, sequential
from sparsellm_lightning.pipeline import block as block_pipeline
from sparsellm_lightning.pipeline.block import alternation_windows
from sparsellm_lightning.reporting.plots import layers_figure
from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    InputStatistics,
    Penalties,
    Ranks,
    Unstructured,
    solve_stacked,
)

METHODS = ["magnitude", "wanda", "sparsegpt", "admm", "sparsellm"]


def assert_cache_is_the_model(context: Context, rtol: float, atol: float) -> None:
    """Prune, and compare the cached hidden states in front of the last block with those of the pruned model."""
    batches = random_batches()
    calibration = calibration_batches(batches)
    _, cache = prune_blocks(context, calibration)
    expected = block_inputs(context.layout.model, context.layout.blocks[-1].module, batches)
    assert_same_hidden(cache.hidden, expected, calibration, rtol, atol)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_pruned_reproduces_the_model(name: str) -> None:
    model = build_model(name)
    before = state_of(model)
    config = PruningConfig(preset="paper", sparsity=0.0)
    assert_cache_is_the_model(make_context(model, config), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("target", ["block", "model"])
def test_cached_hidden_states_are_those_of_the_pruned_model(
    name: str, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With target ``model``, a second cache holds the hidden states of the dense model."""
    model, batches = build_model(name), random_batches()
    dense = block_outputs(model, describe(model).blocks[-1].module, batches)
    followed = dense_activations(monkeypatch)
    config = PruningConfig(preset="paper", sparsity=0.6, target=target, num_iterations=2)
    assert_cache_is_the_model(make_context(model, config), rtol=1e-4, atol=1e-5)
    assert bool(followed) == (target == "model")
    for second in followed[-1:]:
        assert_same_hidden(second.hidden, dense, calibration_batches(batches), rtol=1e-4, atol=1e-5)
    pruned = block_outputs(model, describe(model).blocks[-1].module, batches)
    assert not torch.allclose(pruned[0], dense[0], rtol=1e-2, atol=1e-2), "pruning changes the hidden states"


@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_windows_of_the_dense_model(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of tuning use the first two windows, besides the held-out one. The alternation is fitted to all."""
    tune_with(monkeypatch, batch_tokens=32)
    followed = dense_activations(monkeypatch)
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    model = build_model("llama")
    (dense,) = block_outputs(model, describe(model).blocks[-1].module, [{"input_ids": ids}])
    config = PruningConfig(
        preset="paper",
        method=method,
        num_iterations=2,
        target="model",
        reconstruction_steps=2,
        num_calibration_samples=8,
        solver_precision="float32",
    )
    prune_model(model, [ids], config)
    windows = [0, 1, 7] if method == "sparsegpt" else list(range(8))
    torch.testing.assert_close(torch.cat(followed[-1].hidden), dense[windows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_dense_activations_under_autocast(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded where they are goals of tuning alone, and not where they are targets of the alternation."""
    monkeypatch.setattr("sparsellm_lightning.calibration.context.coarse_dtype", lambda device, exact: torch.bfloat16)
    followed = dense_activations(monkeypatch)
    model, batches = build_model("llama"), random_batches()
    dense = torch.cat(block_outputs(model, describe(model).blocks[-1].module, batches))
    settings: dict[str, Any] = {"target": "model", "num_iterations": 2, "reconstruction_steps": 8}
    config = PruningConfig(preset="paper", method=method, **settings)
    prune_blocks(make_context(model, config), calibration_batches(batches))
    error = (torch.cat(followed[-1].hidden) - dense).norm() / dense.norm()
    assert (1e-4 < error < 2e-2) if method == "sparsegpt" else (error < 1e-5)


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [("sparsegpt", 0, {False}), ("sparsegpt", 8, {True}), ("sparsellm", 0, {False}), ("sparsellm", 8, {False, True})],
)
def test_forwards_under_autocast(method: Any, steps: int, expected: set[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are tuned run under autocast. Beside an alternation, only the tuning does."""
    monkeypatch.setattr("sparsellm_lightning.calibration.context.coarse_dtype", lambda device, exact: torch.bfloat16)
    model, seen = build_model("llama"), set()
    for block in describe(model).blocks:
        for projection in block.projections():
            projection.module.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    config = PruningConfig(preset="paper", method=method, num_iterations=2, reconstruction_steps=steps)
    prune_blocks(make_context(model, config), calibration_batches(random_batches()))
    assert seen == expected


@pytest.mark.parametrize("alternation", ["all", [-1]])
def test_the_dense_model_has_keys_and_values_of_its_own(alternation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two of Gemma 3n's blocks use those of the second, which the pruned model computes too.

    None are in bfloat16 if a later block runs in float32, as targets of the alternation do.
    """
    monkeypatch.setattr("sparsellm_lightning.calibration.context.coarse_dtype", lambda device, exact: torch.bfloat16)
    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2}
    model = tiny_model("gemma3n_text", vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, **layers)
    batches = random_batches()
    last = describe(model).blocks[-1]
    dense = [last.batch_first(hidden) for hidden in block_outputs(model, last.module, batches)]
    followed = dense_activations(monkeypatch)
    settings: dict[str, Any] = {"sparsity": 0.7, "target": "model", "num_iterations": 2}
    config = PruningConfig(preset="paper", alternation_blocks=alternation, **settings)
    prune_blocks(make_context(model, config), calibration_batches(batches))
    assert_same_hidden(followed[-1].hidden, dense, calibration_batches(batches), rtol=1e-4, atol=1e-5)


def dense_activations(patch: pytest.MonkeyPatch) -> list[ActivationCache]:
    """A list to which runs will add the cache of the dense model's activations, once for each block."""
    caches: list[ActivationCache] = []
    advance = sequential._advance_dense

    def seen(context: Context, block: Block, dense: ActivationCache, alternates: bool) -> Any:
        caches.append(dense)
        return advance(context, block, dense, alternates)

    patch.setattr(sequential, "_advance_dense", seen)
    return caches


class OwnConfig(PretrainedConfig):
    model_type = "own"
    vocab_size = VOCABULARY


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class OwnModel(PreTrainedModel):
    """A class of a user's own, whose forward takes tokens and a mask alone, and whose blocks have names."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleDict({"first": OwnBlock(), "second": OwnBlock()})
        self.head = nn.Linear(32, VOCABULARY)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        for block in self.blocks.values():
            hidden = block(hidden)
        return CausalLMOutput(logits=self.head(hidden))


def test_a_class_of_a_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "own", Architecture(blocks="blocks"))
    model = OwnModel(OwnConfig())
    config = PruningConfig(sparsity=0.5, reconstruction_steps=2, num_calibration_samples=8)
    with pytest.warns(UserWarning, match="goes without distillation"):  # the class has no decoder apart from the head
        report = prune_model(model, random_batches(), config)
    assert report.sparsity["achieved"] == pytest.approx(0.5, abs=2e-3)
    assert [layer["name"] for layer in report.layers] == [
        f"blocks.{b}.{p}" for b in ("first", "second") for p in ("up", "down")
    ]
    assert perplexity(model, random_batches()) > 1
    layers_figure(report)


@pytest.mark.parametrize(
    ("settings", "because", "read"),
    [
        (
            {"local_solver": "wanda", "num_iterations": 7, "alternation_blocks": "first_half"},
            "method is",
            {"method": "sparsellm"},
        ),
        ({"penalties": Penalties(beta=2.0)}, "method is magnitude", {"method": "sparsellm"}),
        ({"allocation_spread": 0.1}, "allocation is uniform", {"allocation": "owl"}),
        ({"round_to": 32}, "pattern unstructured removes no hidden units", {"pattern": "neurons"}),
    ],
)
def test_settings_without_effect_are_named(settings: dict[str, Any], because: str, read: dict[str, Any]) -> None:
    def warned(**more: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            few: dict[str, Any] = {
                "preset": "paper",
                "method": "magnitude",
                "num_calibration_samples": 8,
                "sparsity": 0.5,
            }
            prune_model(build_model("llama"), random_batches(), PruningConfig(**few | settings | more))
        return [str(warning.message) for warning in shown if "Without effect" in str(warning.message)]

    (message,) = warned()
    assert message.startswith(f"Without effect: {', '.join(settings)}, because ")
    assert because in message
    assert warned(**read) == []


def test_blocks_that_return_tuples() -> None:
    """Those of BLOOM."""
    torch.manual_seed(0)
    settings = BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4, hidden_act="gelu_pytorch_tanh")
    model = BloomForCausalLM(settings).eval()
    returned: list[Any] = []
    with model.transformer.h[1].register_forward_hook(lambda _, args, output: returned.append(output)):
        block_inputs(model, model.transformer.h[1], random_batches())
    assert all(isinstance(output, tuple) for output in returned)
    config = PruningConfig(
        preset="paper", sparsity=0.6, num_iterations=2, target="model", allocation="kl", reconstruction_steps=2
    )
    assert_cache_is_the_model(make_context(model, config), rtol=1e-4, atol=1e-5)


CASES = [
    *((name, "sparsellm", "unstructured") for name in CONFIGS),
    *((name, "sparsegpt", "2:4") for name in LAYOUTS),
    *(("llama", method, pattern) for method in METHODS[:4] for pattern in ("unstructured", "1:4")),
    ("opt", "sparsellm", "1:4"),
]


@pytest.mark.parametrize(("name", "method", "pattern"), CASES)
def test_every_architecture_method_and_pattern(name: str, method: Any, pattern: str) -> None:
    model = build_model(name)
    dense = state_of(model)
    parameters = list(model.parameters())
    report = prune_model(
        model,
        random_batches(),
        PruningConfig(preset="paper", pattern=pattern, method=method, num_iterations=2, num_calibration_samples=8),
    )
    layout = describe(model)
    edited = {id(p.parameter) for p in layout.projections()}
    pruned = {key for key, parameter in model.named_parameters() if id(parameter) in edited}
    for key, value in model.state_dict().items():
        if key not in pruned:
            assert torch.equal(value, dense[key]), f"{key} must stay dense"
    for projection in layout.projections():
        weight = projection.matrix
        if pattern == "unstructured":
            assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        else:
            kept, group = map(int, pattern.split(":"))
            assert ((weight.reshape(-1, group) != 0).sum(1) <= kept).all()
    assert report.sparsity["achieved"] == pytest.approx(0.75 if pattern == "1:4" else 0.5, abs=0.005)
    assert all(math.isfinite(layer["error"]) for layer in report.layers)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "parameters are edited in place"


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_accuracy_on_trained_models(name: str, trained, text, calibration) -> None:
    """At 70 %, each method is better than the one before it, and the alternation's errors fall below its first one."""
    results = {"dense": perplexity(trained(name), text.test_dataloader())}
    for method in ("magnitude", "sparsegpt", "sparsellm"):
        model = trained(name)
        config = PruningConfig(
            preset="paper", sparsity=0.7, method=method, num_calibration_samples=64, calibration_val_fraction=0.0
        )
        report = prune_model(model, calibration, config)
        results[method] = perplexity(model, text.test_dataloader())
    assert results["dense"] < results["sparsellm"] < results["sparsegpt"] < results["magnitude"], results
    for block in report.blocks:
        assert min(block["errors"]) < block["errors"][0]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_first_iteration_is_the_local_solver(name: str) -> None:
    """One iteration of ``sparsellm`` gives the weights of ``sparsegpt``."""
    states = []
    for method in ("sparsellm", "sparsegpt"):
        model = build_model(name)
        config = PruningConfig(preset="paper", sparsity=0.6, method=method, num_iterations=1)
        results, _ = prune_blocks(make_context(model, config), calibration_batches(random_batches()))
        assert [len(result.errors) for result in results] == [int(method == "sparsellm")] * 3
        states.append(state_of(model))
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=1e-5, atol=1e-6, msg=key)
        assert torch.equal(tensor == 0, states[1][key] == 0), key


def test_target_model_corrects_earlier_blocks(trained, text, calibration) -> None:
    """With the dense model's own output as the target, the pruned model's hidden states are closer to the dense model's."""
    batches = [{"input_ids": next(iter(text.test_dataloader()))["input_ids"]}]

    def end_of(model: Any) -> torch.Tensor:
        (hidden,) = block_outputs(model, describe(model).blocks[-1].module, batches)
        return hidden

    reference, distances = end_of(trained("llama")), {}
    for target in ("block", "model"):
        model = trained("llama")
        config = PruningConfig(preset="paper", sparsity=0.7, target=target, num_calibration_samples=64)
        prune_model(model, calibration, config)
        distances[target] = float((end_of(model) - reference).norm())
    assert distances["model"] < distances["block"]


def masks_of(model: Any) -> torch.Tensor:
    return torch.cat([p.parameter.flatten() != 0 for p in describe(model).projections()])


def test_padding_is_left_out(trained, calibration) -> None:
    """Padded windows give the masks of the same windows without padding, up to rounding."""
    masks = []
    ids = torch.cat([batch["input_ids"] for batch in calibration])[:16]
    for padding in (0, 7):
        model = trained("llama")
        padded = torch.nn.functional.pad(ids, (0, padding), value=0)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, padding), value=0)
        report = prune_model(
            model,
            [{"input_ids": padded, "attention_mask": mask}],
            PruningConfig(preset="paper", sparsity=0.6, num_calibration_samples=16),
        )
        assert report.calibration == {"windows": 16, "held_out": 2, "written": 0, "tokens": ids.numel()}
        masks.append(masks_of(model))
    assert (masks[0] == masks[1]).float().mean() > 0.999


def test_bfloat16(trained, text, calibration) -> None:
    model = trained("llama").bfloat16()
    config = PruningConfig(preset="paper", sparsity=0.6, num_calibration_samples=64)
    report = prune_model(model, calibration, config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=0.002)
    full = trained("llama")
    prune_model(full, calibration, config)
    assert perplexity(model, text.test_dataloader()) < 1.1 * perplexity(full, text.test_dataloader())


def test_ignore_and_alternation_blocks() -> None:
    model = build_model("llama")
    dense = state_of(model)
    config = PruningConfig(
        preset="paper",
        sparsity=0.6,
        ignore=["down_proj", "model.layers.0.self_attn.*"],
        alternation_blocks=[-1],
        num_calibration_samples=8,
    )
    report = prune_model(model, random_batches(), config)
    for layer in report.layers:
        ignored = layer["name"].endswith("down_proj") or ".layers.0.self_attn." in layer["name"]
        assert (layer["sparsity"] < 0.01) == ignored, layer
        assert (layer["error"] is None) == ignored
        if ignored:
            assert torch.equal(model.get_submodule(layer["name"]).weight, dense[f"{layer['name']}.weight"])
    assert [len(block["errors"]) for block in report.blocks] == [0, 0, 4]


def test_calibration_leaves_mode_and_random_state() -> None:
    model = build_model("opt")
    model.train()
    model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    config = PruningConfig(preset="paper", method="magnitude", num_calibration_samples=8)
    prune_model(model, random_batches(), config)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(module) for module in model.modules()), "blocks have their own forward back"


def test_nothing_is_tuned_at_sparsity_0() -> None:
    config = PruningConfig(sparsity=0.0, num_calibration_samples=8)
    assert config.reconstruction_steps
    report = prune_model(build_model("llama"), random_batches(), config)
    assert all(block["reconstruction"] is None for block in report.blocks)
    assert "reconstruction" not in report.phases


def test_operations_of_a_rounded_model() -> None:
    config = PruningConfig(preset="fast", distillation_steps=1, num_calibration_samples=8, solver_precision="float32")
    work = prune_model(build_model("llama").bfloat16(), random_batches(), config).work
    for phase in ("forward", "reconstruction", "distillation"):
        assert set(work[phase]) == {"bfloat16"}, phase
    assert "float32" in work["local_solve"]


def test_no_dropout() -> None:
    """Calibration and perplexity are in evaluation mode, as the trained model is used, also inside a Trainer."""
    config = PruningConfig(preset="paper", sparsity=0.6, method="sparsegpt", num_calibration_samples=8)
    pruned = []
    for training in (True, False):
        model = build_model("opt")
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.3
        model.train(training)
        prune_model(model, random_batches(), config)
        pruned.append((state_of(model), perplexity(model, random_batches())))
    (one, one_perplexity), (other, other_perplexity) = pruned
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert one_perplexity == other_perplexity


def test_compiled_blocks() -> None:
    reference, compiled = build_model("llama"), build_model("llama")
    for layer in compiled.model.layers:
        layer.compile()
    for model in (reference, compiled):
        config = PruningConfig(preset="paper", sparsity=0.6, method="sparsegpt", num_calibration_samples=8)
        prune_model(model, random_batches(), config)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), compiled.parameters(), strict=True))


def test_bad_input() -> None:
    config = PruningConfig(preset="paper")
    with pytest.raises(UserError, match="at least one calibration window"):
        prune_model(build_model("llama"), [], config)
    with pytest.raises(UserError, match="batch of text"):
        prune_model(build_model("llama"), ["text"], config)


@pytest.mark.parametrize("method", ["sparsellm", "wanda"])
@pytest.mark.parametrize(
    ("overflowing", "named"),
    [
        ("self_attn.v_proj", r"model\.layers\.1\.self_attn\.o_proj"),
        ("mlp.up_proj", r"model\.layers\.1\.mlp\.down_proj"),
    ],
)
def test_overflow_names_the_projection(method: Any, overflowing: str, named: str) -> None:
    """Weights are finite, but a product inside the middle block overflows. The message names the next projection."""
    model = build_model("llama")
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{overflowing}.weight").mul_(1e38)
    config = PruningConfig(preset="paper", method=method, num_calibration_samples=8)
    with pytest.raises(NumericalError, match=named):
        prune_model(model, random_batches(), config)


def test_few_tokens_warn_with_both_numbers() -> None:
    windows = torch.randint(0, 512, (3, 32), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"preset": "paper", "method": "magnitude"}
    with pytest.warns(UserWarning, match="32 calibration tokens are fewer than the 128"):
        prune_model(build_model("llama"), [windows], PruningConfig(**settings, num_calibration_samples=1))
    with pytest.warns(UserWarning, match="is 200, but the dataloader gave 3"):
        report = prune_model(build_model("llama"), [windows], PruningConfig(**settings, num_calibration_samples=200))
    assert report.calibration["windows"] == 3


def test_a_dtype_that_is_slow_here_is_named(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(admission, "gemm_peak", lambda device, dtype, seconds: 50.0 if dtype == torch.float32 else 1.0)
    config = PruningConfig(preset="paper", method="magnitude", num_calibration_samples=8)
    prune_model(build_model("llama"), random_batches(), config)
    assert not [one for one in recwarn if "times slower" in str(one.message)]
    with pytest.warns(UserWarning, match="multiplies 50 times slower in bfloat16 than in float32"):
        prune_model(build_model("llama").to(torch.bfloat16), random_batches(), config)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (640, 10), (641, 11), (6399, 100), (6400, None)])
@pytest.mark.parametrize("size", [1, 3])
def test_which_windows_carry_auxiliaries(
    tokens: int, expected: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 windows of 64 tokens, window i on rank i mod size. The first windows of all ranks carry auxiliaries."""
    monkeypatch.setattr(block_pipeline, "ALTERNATION_TOKENS", Fraction(tokens, 128))
    model = build_model("llama")
    describe(model)  # its hooks are not made for ranks that are threads

    def work(ranks: Ranks) -> list[int] | None:
        mine = range(ranks.rank, 100, ranks.size)
        context = make_context(model, PruningConfig(preset="paper"), ranks)
        count = alternation_windows(context, [64] * len(mine), 128)
        return None if count is None else list(mine[:count])

    results = on_ranks(size, work)
    if expected is None:
        assert results == [None] * size
    else:
        assert sorted(window for windows in results for window in windows) == list(range(expected))


@pytest.mark.parametrize("size", [1, 3])
def test_windows_without_tokens_of_an_expert_carry_no_auxiliaries(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first windows have none. The fewest leading windows that have 100 tokens end with number 5."""
    monkeypatch.setattr(block_pipeline, "ALTERNATION_TOKENS", 1)
    model = build_model("llama")
    describe(model)  # its hooks are not made for ranks that are threads
    tokens = [0, 0, 0, 0, 64, 64, 64, 64]

    def work(ranks: Ranks) -> list[int]:
        mine = range(ranks.rank, len(tokens), ranks.size)
        context = make_context(model, PruningConfig(preset="paper"), ranks)
        return list(mine[: alternation_windows(context, [tokens[i] for i in mine], 100)])

    assert sorted(window for windows in on_ranks(size, work) for window in windows) == list(range(6))


def test_alternation_tokens_reach_the_solver(trained, calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens with auxiliaries change the result, until all carry them. They do not change the first iteration.

    56 windows of 64 tokens are fitted: 28 for each of the 128 hidden features.
    """
    errors = {}
    for per_feature in (5, 28, 10**6):
        monkeypatch.setattr(block_pipeline, "ALTERNATION_TOKENS", per_feature)
        config = PruningConfig(preset="paper", sparsity=0.7, num_iterations=2, num_calibration_samples=64)
        report = prune_model(trained("llama"), calibration, config)
        errors[per_feature] = [block["errors"] for block in report.blocks]
    assert errors[5] != errors[28] == errors[10**6]
    assert errors[5][0][0] == pytest.approx(errors[28][0][0], rel=1e-6)


@pytest.mark.parametrize("damping", [0.01, 0.4])
@pytest.mark.parametrize(
    ("settings", "solver"),
    [
        ({"method": "admm"}, "admm"),
        ({"method": "sparsellm", "local_solver": "wanda"}, "wanda"),
        ({"method": "sparsegpt"}, "sparsegpt"),
    ],
)
def test_settings_reach_the_solvers(
    settings: dict[str, Any], solver: str, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first matrices are those that the solver alone gives, and the alternation gets its settings."""
    given: list[dict[str, Any]] = []
    solve = sequential.solve_feed_forward
    monkeypatch.setattr(
        sequential, "solve_feed_forward", lambda *args, **options: given.append(options) or solve(*args, **options)
    )
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    model, dense, inputs = build_model("llama"), build_model("llama"), []
    attention = dense.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense(ids)
    weights = {name: getattr(attention, name).weight.detach() for name in ("q_proj", "k_proj", "v_proj")}
    statistics = InputStatistics(inputs[0].T @ inputs[0] / len(inputs[0]), damping)
    patterns = dict.fromkeys(weights, Unstructured(0.6))
    expected = solve_stacked(weights, statistics, patterns, LOCAL_SOLVERS[solver])
    more: dict[str, Any] = {"num_iterations": 2, "num_calibration_samples": 8, "calibration_val_fraction": 0.0}
    config = PruningConfig(
        preset="paper", sparsity=0.6, damping=damping, penalties=Penalties(beta=3.0), **settings, **more
    )
    prune_model(model, [ids], config)
    for name, weight in expected.items():
        found = getattr(model.model.layers[0].self_attn, name).weight.detach()
        torch.testing.assert_close(found, weight, rtol=1e-2, atol=1e-3)
    assert bool(given) == (settings["method"] == "sparsellm")
    assert all((one["damping"], one["penalties"]) == (damping, config.penalties) for one in given)


@pytest.mark.slow
def test_compiled_steps_of_the_alternation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long runs compile the z and s steps. Their errors are those of the plain steps, to rounding."""

    def errors() -> list[float]:
        config = PruningConfig(preset="paper", sparsity=0.6, num_iterations=2, num_calibration_samples=8)
        report = prune_model(build_model("llama"), random_batches(), config)
        return [error for block in report.blocks for error in block["errors"]]

    plain, before = errors(), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(sequential, "WORTH_COMPILING", 0)
    assert errors() == pytest.approx(plain, rel=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
