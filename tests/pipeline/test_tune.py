"""Masked reconstruction, against plain Adam on a copy of the block; and the parts of the model that it must not change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import (
    LAYOUTS,
    assert_same_hidden,
    block_inputs,
    calibration_batches,
    first_of,
    make_context,
    prune_blocks,
    state_of,
    tune_with,
    zero_smaller_half,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import LoraOptions, PruningConfig, TextDataModule, perplexity, prune_model
from sparsellm_lightning.architecture import Block, describe
from sparsellm_lightning.calibration import ActivationCache, capture
from sparsellm_lightning.data import take_windows
from sparsellm_lightning.pipeline import sequential
from sparsellm_lightning.pipeline.kept import in_random_order
from sparsellm_lightning.pipeline.tune import Reconstructor, _batches_of_steps, batches_of_interest
from sparsellm_lightning.solvers import SINGLE, Ranks
from sparsellm_lightning.sparsity import add_adapters

Batch = dict[str, Tensor]
Trained = Callable[[str], PreTrainedModel]
CPU = torch.device("cpu")

# random_batches() gives eight windows in batches of 3, 3 and 2. The first five are fitted where a test holds windows out.
# LARGEST: fitted tokens of the larger batch.
FITTED, LARGEST = 5, 22 + 32 + 32


@dataclass
class Case:
    """The middle block of a model. Half of each of its weights is pruned. Its goal is its dense output."""

    model: PreTrainedModel
    block: Block
    cache: ActivationCache
    calls: list[
        tuple[tuple[Any, ...], dict[str, Any]]
    ]  # by batch, the arguments with which transformers calls the block
    goal: list[Tensor]
    valid: list[Tensor]

    def reconstructor(self, steps: int, precision: Any = "float32", **options: Any) -> Reconstructor:
        config = PruningConfig(preset="paper", reconstruction_steps=steps, solver_precision=precision)
        options = {"batch_tokens": 2 * LARGEST, **options}
        return Reconstructor(make_context(self.model, config), self.block, self.cache, self.goal, **options)


def make_case(name: str, fitted: int | None = None, dtype: torch.dtype = torch.float32) -> Case:
    model, batches = build_model(name), random_batches()
    nn.Module.to(model, dtype)
    context = make_context(model, PruningConfig(preset="paper"))
    block = context.layout.blocks[1]
    cache = capture(context, calibration_batches(batches), 8 if fitted is None else fitted)
    calls, goal = [], []
    handles = [
        block.module.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True),
        block.module.register_forward_hook(lambda _, args, output: goal.append(first_of(output))),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    cache.hidden = [args[0] if args else kwargs["hidden_states"] for args, kwargs in calls]
    zero_smaller_half(block.projections())
    return Case(model, block, cache, calls, goal, [batch["attention_mask"].bool() for batch in batches])


def adam_by_hand(case: Case, fitted: int, steps: int, rate: float, importance: Tensor) -> nn.Module:
    """Adam on all fitted tokens. Pruned weights are set to zero after every step."""
    module = copy.deepcopy(case.block.module)
    pruned = {f"{p.name}.weight".removeprefix(f"{case.block.name}.") for p in case.block.projections()}
    parameters = dict(module.named_parameters())
    masks = {name: (parameter != 0) for name, parameter in parameters.items() if name in pruned}
    groups = []
    for name, parameter in parameters.items():
        entries = [w for w in parameter.flatten().tolist() if w or name not in pruned]
        size = math.sqrt(sum(w * w for w in entries) / len(entries))
        groups.append({"params": [parameter], "lr": rate * max(size, 1e-3) * parameter.numel() / len(entries)})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    warm = max(steps // 10, 1)
    schedules = torch.optim.lr_scheduler
    cosine = schedules.CosineAnnealingLR(optimizer, steps)
    schedule = schedules.ChainedScheduler([schedules.LinearLR(optimizer, 1 / warm, total_iters=warm - 1), cosine])
    valid = torch.cat(case.valid)[:fitted]
    for _ in range(steps):
        optimizer.zero_grad()
        output = torch.cat([first_of(module(*args, **kwargs)) for args, kwargs in case.calls])[:fitted][valid]
        wanted = torch.cat(case.goal)[:fitted][valid]
        losses = [
            (importance * (is_ - should).square()).sum() / (importance * should.square()).sum()
            for is_, should in zip(output, wanted, strict=True)
        ]
        (sum(losses, torch.zeros(())) / len(losses)).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
    return module


def naive_error(case: Case, module: nn.Module, windows: slice, importance: Tensor) -> float:
    """``Σ min(‖B(h) − g‖²w, 1) / Σ min(‖h − g‖²w, 1)`` with ``w = 1/‖g‖²``, one token after the other.

    ``‖x‖² = Σ F x²`` with the importance F of the features.
    """
    error = scale = 0.0
    with torch.no_grad():
        output = torch.cat([first_of(module(*args, **kwargs)) for args, kwargs in case.calls])
    for b, h, g, valid in zip(
        output[windows].double(),
        torch.cat(case.cache.hidden)[windows].double(),
        torch.cat(case.goal)[windows].double(),
        torch.cat(case.valid)[windows],
        strict=True,
    ):
        for token in valid.nonzero().flatten().tolist():
            size = float((importance * g[token].square()).sum())
            error += min(float((importance * (b[token] - g[token]).square()).sum()) / size, 1)
            scale += min(float((importance * (h[token] - g[token]).square()).sum()) / size, 1)
    return error / scale


@torch.no_grad()
def tune(reconstructor: Reconstructor) -> tuple[list[tuple[float, float]], int]:
    return reconstructor.tune()


@pytest.mark.parametrize(
    ("name", "fitted"),
    [("llama", None), ("llama", FITTED), ("gemma3", FITTED), ("opt", None), ("opt-350m", FITTED), ("gpt2", FITTED)],
)
def test_against_plain_adam(name: str, fitted: int | None) -> None:
    """Each step has all batches, so that their order does not matter. Norms and biases are tuned too."""
    case, windows = make_case(name, fitted), 8 if fitted is None else fitted
    steps, rate = 20, 3e-3
    before = copy.deepcopy(case.block.module)
    width = case.goal[0].shape[-1]
    importance = torch.ones(width) if fitted is None else torch.linspace(0.1, 3, width)
    expected = adam_by_hand(case, windows, steps, rate, importance)
    tokens = int(torch.cat(case.valid).sum()) if fitted is None else 2 * LARGEST
    weighted = {} if fitted is None else {"importance": importance}
    errors, kept = tune(case.reconstructor(steps, learning_rate=rate, batch_tokens=tokens, **weighted))
    assert kept == steps
    wanted = expected.state_dict()
    for key, found in case.block.module.state_dict().items():
        # The softmax does not depend on the keys' bias. Its gradient is rounding, which Adam scales to whole steps.
        if name.startswith("opt") and key.endswith("k_proj.bias"):
            continue
        keys = slice(64, 128) if key.endswith("c_attn.bias") else slice(0)
        found, theirs = found.clone(), wanted[key].clone()
        found[keys], theirs[keys] = 0, 0
        assert torch.allclose(found, theirs, rtol=1e-5, atol=1e-5), key
    for found_errors, module in zip(errors, (before, expected), strict=True):
        assert found_errors[0] == pytest.approx(naive_error(case, module, slice(windows), importance), rel=1e-3)
        if fitted is None:
            assert math.isnan(found_errors[1])
        else:
            assert found_errors[1] == pytest.approx(
                naive_error(case, module, slice(windows, None), importance), rel=1e-3
            )


def test_every_block_is_tuned_by_its_own_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = {index: torch.full((64,), index + 1.0) for index in range(3)}
    seen: dict[int, Tensor | None] = {}

    def reconstructor(context: Any, block: Block, cache: Any, goal: Any, weights: Tensor | None) -> Reconstructor:
        seen[block.index] = weights
        return Reconstructor(context, block, cache, goal, weights)

    monkeypatch.setattr(sequential, "feature_importance", lambda context, cache: importance)
    monkeypatch.setattr(sequential, "Reconstructor", reconstructor)
    config = PruningConfig(preset="paper", method="magnitude", reconstruction_steps=1, num_calibration_samples=8)
    prune_model(build_model("llama"), random_batches(), config)
    assert seen == importance


@pytest.mark.parametrize("steps", ["reconstruction_steps", "distillation_steps"])
def test_the_seed_orders_the_windows(steps: str) -> None:
    def tuned(seed: int) -> dict[str, Tensor]:
        model, settings = build_model("llama"), {steps: 3, "seed": seed, "num_calibration_samples": 64}
        prune_model(model, random_batches(64, 32), PruningConfig(preset="paper", method="magnitude", **settings))
        return state_of(model)

    one, again, other = tuned(1), tuned(1), tuned(0)
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(("name", "autocast"), [("opt", False), ("gemma3", True)])
def test_rest_of_the_model_does_not_change(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters outside the block keep their values, and those inside keep ``requires_grad`` and their gradients."""
    dtype = torch.bfloat16 if autocast else torch.float32
    monkeypatch.setattr("sparsellm_lightning.calibration.context.coarse_dtype", lambda device, exact: dtype)
    case = make_case(name, FITTED)
    parameters = dict(case.model.named_parameters())
    for index, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    had = {key: (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for key, p in parameters.items()}
    before = state_of(case.model)
    reconstructor = case.reconstructor(steps=8)
    with reconstructor._autocast():
        assert torch.is_autocast_enabled("cpu") == autocast
    errors, kept = tune(reconstructor)
    assert kept > 0
    assert errors[1][0] < errors[0][0]
    assert errors[1][1] < errors[0][1]
    for key, parameter in case.model.named_parameters():
        assert parameter is parameters[key]
        requires_grad, gradient, value = had[key]
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is gradient
        assert value is None or (gradient is not None and torch.equal(gradient, value))
        assert torch.equal(parameter, before[key]) != key.startswith(f"{case.block.name}."), key


@pytest.mark.parametrize("fitted", [None, FITTED])
def test_steps_that_are_too_large_change_nothing(fitted: int | None) -> None:
    case = make_case("opt", fitted)
    before = state_of(case.model)
    errors, kept = tune(case.reconstructor(steps=4, learning_rate=10.0))
    assert kept == 0
    assert errors[0][0] == errors[1][0]
    assert errors[0][1] == errors[1][1] or fitted is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in case.model.state_dict().items())


def test_held_out_tokens_decide() -> None:
    """The goal of the held-out windows is the pruned block's own output, so that every step makes their error larger."""
    for fitted, expected in ((FITTED, 0), (8, 8)):
        case = make_case("llama", fitted)
        with torch.no_grad():
            now = [first_of(case.block.module(*args, **kwargs)) for args, kwargs in case.calls]
        first, second = slice(0, 2), slice(2, None)  # of the middle batch
        case.goal = [case.goal[0], torch.cat([case.goal[1][first], now[1][second]]), now[2]]
        errors, kept = tune(case.reconstructor(steps=8, learning_rate=1.5e-2, batch_tokens=10**3))
        assert kept == expected
        assert errors[0][1] == pytest.approx(0, abs=1e-10) or fitted == 8
        assert errors[1][0] < errors[0][0] or fitted == FITTED


def test_one_token_with_a_huge_error_does_not_decide() -> None:
    """A held-out token counts for 1 at most, although its error is a million times the others' and grows with every step."""
    usual = make_case("llama", FITTED)
    last = (len(usual.calls) - 1, -1)  # the last window, which has no padding
    assert usual.valid[last[0]][last[1]].all()

    def sizes(case: Case) -> Tensor:
        args, kwargs = case.calls[last[0]]
        with torch.no_grad():
            return first_of(case.block.module(*args, **kwargs))[last[1]].norm(dim=-1)

    before, options = sizes(usual), {"steps": 32, "learning_rate": 3e-3, "batch_tokens": 2 * LARGEST}
    (expected, _), kept = tune(usual.reconstructor(**options))
    growth = sizes(usual) / before
    assert kept == 32
    assert growth.max() > 1.001
    case = make_case("llama", FITTED)
    case.goal[last[0]][last[1], growth.argmax()] *= 1e-3
    errors, kept = tune(case.reconstructor(**options))
    assert kept == 32
    assert errors[0][1] < 2 * expected[1]
    for key, tensor in case.block.module.state_dict().items():
        assert torch.equal(tensor, usual.block.module.state_dict()[key]), key


def test_best_checked_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama", FITTED)
    held_out, snapshots, asked = iter([1.0, 0.9, 0.5, 0.7, float("nan"), 0.4]), [], []

    def errors(self: Reconstructor, held_out_only: bool = False) -> tuple[float, float]:
        snapshots.append(state_of(self.block.module))
        asked.append(held_out_only)
        return (0.1 * len(snapshots), next(held_out))

    monkeypatch.setattr(Reconstructor, "errors", errors)
    (before, after), kept = tune(case.reconstructor(steps=64))
    assert asked == [False, True, True, True, False, False], "before, after every 16 steps, and of the best"
    assert kept == 32
    assert (before[1], after[1]) == (1.0, 0.4)
    for other, expected in ((2, True), (1, False), (4, False)):
        same = [torch.equal(t, snapshots[other][key]) for key, t in case.block.module.state_dict().items()]
        assert all(same) == expected


def test_bfloat16_has_float32_masters() -> None:
    """For weights above 0.01, one step is less than half a unit in the last place, and 64 steps together are more."""
    moved = {}
    for steps in (1, 64):
        case = make_case("llama", dtype=torch.bfloat16)
        before = state_of(case.block.module)
        tune(case.reconstructor(steps=steps, learning_rate=1e-4))
        assert {p.dtype for p in case.model.parameters()} == {torch.bfloat16}
        changed = total = 0
        for p in case.block.projections():
            old = before[f"{p.name}.weight".removeprefix(f"{case.block.name}.")]
            assert torch.equal(p.parameter == 0, old == 0)
            large = old.abs() > 0.01
            changed, total = changed + int((p.parameter != old)[large].sum()), total + int(large.sum())
        moved[steps] = changed / total
    assert moved[1] == 0
    assert moved[64] > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_values_in_forwards(dtype: torch.dtype) -> None:
    """Float32 parameters hold their values themselves. Others have masters of 4 bytes for each kept entry."""
    case = make_case("llama", dtype=dtype)
    reconstructor = case.reconstructor(steps=3)
    held: list[int] = []
    values = reconstructor.parameters.values
    case.block.module.register_forward_pre_hook(
        lambda *_: held.append(sum(v.untyped_storage().nbytes() for v in values))
    )
    tune(reconstructor)
    masters = 4 * sum(int((p != 0).sum()) for p in case.block.module.parameters())
    assert set(held) == {masters if dtype == torch.bfloat16 else 0}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("pattern", "target"), [("unstructured", "model"), ("2:4", "block")])
def test_every_layout(name: str, pattern: str, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All zeros stay where the solver put them, and the cached hidden states are those of the pruned model."""
    original, tuned = Reconstructor.tune, []

    def tune(self: Reconstructor) -> Any:
        before = {p.name: p.parameter.detach().clone() for p in self.block.projections()}
        result = original(self)
        for p in self.block.projections():
            assert torch.equal(p.parameter == 0, before[p.name] == 0), p.name
            assert int((p.parameter == 0).sum()) == p.parameter.numel() // 2
            tuned.append(not torch.equal(p.parameter, before[p.name]))
        return result

    monkeypatch.setattr(Reconstructor, "tune", tune)
    tune_with(monkeypatch, learning_rate=2e-3, batch_tokens=LARGEST)
    model = build_model(name)
    config = PruningConfig(
        preset="paper",
        pattern=pattern,
        target=target,
        method="magnitude",
        reconstruction_steps=2,
        solver_precision="float32",
    )
    assert_cache_is_the_model(model, config)
    assert len(tuned) == len(list(make_context(model, config).layout.projections()))
    assert sum(tuned) > len(tuned) / 2  # a block keeps the best of its states, which may be the first


def assert_cache_is_the_model(model: PreTrainedModel, config: PruningConfig) -> None:
    """Prune, and compare the cached hidden states in front of the last block with those of the pruned model."""
    context, batches = make_context(model, config), random_batches()
    calibration = calibration_batches(batches)
    _, cache = prune_blocks(context, calibration)
    expected = block_inputs(model, context.layout.blocks[-1].module, batches)
    assert_same_hidden(cache.hidden, expected, calibration, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ignore", "target"),
    [("*.1.*", "block"), ("*.1.*", "model"), ("*.1.mlp.*", "block"), ("*.1.self_attn.*", "model")],
)
def test_ignored_projections(ignore: str, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, or half, of the middle block's projections are ignored."""
    tune_with(monkeypatch, learning_rate=2e-3)
    model = build_model("llama")
    dense = state_of(model)
    config = PruningConfig(
        preset="paper",
        method="magnitude",
        target=target,
        reconstruction_steps=2,
        ignore=[ignore],
        solver_precision="float32",
    )
    assert_cache_is_the_model(model, config)
    for block in make_context(model, config).layout.blocks:
        for p in block.projections():
            assert (float((p.parameter == 0).double().mean()) == 0.5) == p.pruned
        if not any(p.pruned for p in block.projections()):
            assert all(torch.equal(t, dense[f"{block.name}.{key}"]) for key, t in block.module.state_dict().items())


@pytest.mark.parametrize("steps", ["reconstruction_steps", "distillation_steps"])
def test_zeros_of_ignored_projections(steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that an earlier run has pruned."""
    tune_with(monkeypatch, learning_rate=2e-3)
    model = build_model("llama")
    before = {}
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            parameter.data[:, ::2] = 0
            before[name] = parameter.detach().clone()
    settings: dict[str, Any] = {"preset": "paper", "method": "magnitude", "ignore": ["*.self_attn.*"], steps: 2}
    prune_model(model, random_batches(), PruningConfig(**settings))
    for name, dense in before.items():
        now = model.get_parameter(name)
        assert torch.equal(now == 0, dense == 0)
        assert not torch.equal(now, dense)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other token ids in the padding give bit-equal weights."""
    tune_with(monkeypatch, learning_rate=4e-3, batch_tokens=64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (8, 24), generator=generator)
    mask = torch.ones_like(ids)
    (mask[1:4, :9] if side == "left" else mask[1:4, -9:]).zero_()
    config = PruningConfig(
        preset="paper", method="magnitude", target="model", reconstruction_steps=12, num_calibration_samples=8
    )
    models = []
    for seed in (1, 2):
        other = torch.randint(0, VOCABULARY, ids.shape, generator=torch.Generator().manual_seed(seed))
        padded = torch.where(mask == 1, ids, other)
        batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(padded.split(3), mask.split(3), strict=True)]
        model = build_model("llama")
        report = prune_model(model, batches, config)
        assert all(block["reconstruction"]["steps"] > 0 for block in report.blocks)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_adapters_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that peft froze are tuned and are frozen afterwards. Adapters do not change."""
    pytest.importorskip("peft")
    tune_with(monkeypatch, learning_rate=2e-3)
    model = build_model("llama")
    add_adapters(model, LoraOptions(rank=2))
    before, trains = state_of(model), {key: p.requires_grad for key, p in model.named_parameters()}
    config = PruningConfig(preset="paper", method="magnitude", reconstruction_steps=2, num_calibration_samples=8)
    report = prune_model(model, random_batches(), config)
    assert any(block["reconstruction"]["steps"] for block in report.blocks)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == trains[key] == ("lora_" in key)
        if "lora_" in key or "layers" not in key:
            assert torch.equal(parameter, before[key]), key
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert any("layernorm" in key for key in changed)


@pytest.mark.parametrize(("target", "sparsity"), [("block", 0.7), ("model", 0.8)])
def test_a_trained_model_gets_better(
    target: Any,
    sparsity: float,
    trained: Trained,
    text: TextDataModule,
    calibration: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tune_with(monkeypatch, learning_rate=0.02, batch_tokens=1024)
    found = []
    for steps in (0, 24):
        model = trained("llama")
        config = PruningConfig(
            preset="paper",
            sparsity=sparsity,
            method="sparsegpt",
            target=target if steps else "block",
            reconstruction_steps=steps,
            num_calibration_samples=64,
        )
        report = prune_model(model, calibration, config)
        found.append(perplexity(model, text.test_dataloader()))
        assert report.sparsity["achieved"] == pytest.approx(sparsity, abs=1e-4)
        assert report.calibration["held_out"] == (8 if steps else 0)
        for block in report.blocks:
            tuned = block["reconstruction"]
            assert (tuned is None) == (not steps)
            if tuned:
                assert tuned["steps"] > 0
                assert tuned["held_out"][1] < tuned["held_out"][0]
                assert tuned["fitted"][1] < tuned["fitted"][0]
    assert found[1] < 0.96 * found[0], found


@pytest.mark.parametrize(("windows", "fitted"), [(11, 8), (1, 1)])
def test_ranks_give_the_result_of_one_process(windows: int, fitted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step has all fitted windows. If there is one window, the second rank has none."""
    tune_with(monkeypatch, learning_rate=5e-4, batch_tokens=8 * 32)
    ids = torch.randint(0, VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(1))
    config = PruningConfig(
        preset="paper", method="magnitude", target="model", reconstruction_steps=4, solver_precision="float32"
    )
    dense = build_model("llama")

    def prune(ranks: Ranks) -> tuple[PreTrainedModel, list[Any]]:
        model = copy.deepcopy(dense)
        batches, _ = take_windows([ids], windows, ranks, CPU, batch_tokens=32)
        results = sequential.prune_blocks(
            make_context(model, config, ranks), batches, len(range(ranks.rank, fitted, ranks.size))
        )
        return model, [result.reconstruction for result in results]

    single, results = prune(SINGLE)
    many = on_ranks(2, prune)
    assert any(result["steps"] for result in results)
    for model, theirs in many:
        assert theirs == many[0][1]
        for result, expected in zip(theirs, results, strict=True):
            assert result["steps"] == expected["steps"]
            assert result["fitted"] == pytest.approx(expected["fitted"], rel=1e-3)
        for (key, found), first, one in zip(
            model.named_parameters(), many[0][0].parameters(), single.parameters(), strict=True
        ):
            assert torch.equal(found, first), f"{key}: all ranks end bit-equal"
            assert torch.equal(found == 0, one == 0)
            torch.testing.assert_close(found, one, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("number", "together"), [(3, 2), (5, 3), (4, 4), (7, 1)])
def test_no_step_has_a_batch_twice(number: int, together: int) -> None:
    steps = list(islice(in_random_order(range(number), together, torch.Generator().manual_seed(0)), 30 * number))
    assert all(len(set(step)) == together for step in steps)
    drawn = list(chain(*steps))
    rounds = [drawn[first : first + number] for first in range(0, len(drawn), number)]
    assert all(sorted(one) == list(range(number)) for one in rounds), "each batch once in every round"
    assert len(set(map(tuple, rounds))) > 1


def test_a_step_sees_no_window_twice() -> None:
    """A step of more tokens than there are fitted ones visits each fitted batch once."""
    case = make_case("llama", FITTED)
    reconstructor = case.reconstructor(steps=2, batch_tokens=10**4)
    seen: list[int] = []
    original = reconstructor._forward
    reconstructor._forward = lambda index: (torch.is_grad_enabled() and seen.append(index), original(index))[1]  # type: ignore[method-assign]
    tune(reconstructor)
    fitted = [index for index, count in enumerate(reconstructor.fitted) if count]
    assert sorted(seen[: len(fitted)]) == sorted(seen[len(fitted) :]) == fitted


@pytest.mark.parametrize("name", LAYOUTS)
def test_reconstruction_starts_from_the_local_solver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps too small to change a weight, the weights are those of a run without reconstruction."""
    tune_with(monkeypatch, learning_rate=1e-30)
    states = []
    for steps in (0, 1):
        model = build_model(name)
        settings: dict[str, Any] = {"method": "sparsegpt", "solver_precision": "float32"}
        config = PruningConfig(preset="paper", sparsity=0.6, reconstruction_steps=steps, **settings)
        context = make_context(model, config)
        results, _ = prune_blocks(context, calibration_batches(random_batches()))
        for result in results:
            assert len(result.layer_errors) == len(list(context.layout.blocks[result.index].projections()))
        states.append(state_of(model))
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-6, atol=1e-7, msg=key)
        assert torch.equal(states[1][key] == 0, tensor == 0), key


@pytest.mark.parametrize("size", [1, 2])
def test_batches_that_tuning_uses(size: int) -> None:
    """Two steps of one window on each rank use two fitted batches, besides those with held-out windows."""
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(1))
    config, model = PruningConfig(preset="paper", method="magnitude", reconstruction_steps=2), build_model("llama")
    describe(model)  # its hooks are not made for ranks that are threads

    def used(ranks: Ranks) -> list[int]:
        context = make_context(model, config, ranks)
        batches, _ = take_windows([ids], 16, ranks, CPU, batch_tokens=32)
        hidden = [torch.zeros(1, 32, 1) for _ in batches]
        fitted = len(range(ranks.rank, 12, ranks.size))
        return batches_of_interest(
            context, ActivationCache(hidden, [], [None] * len(hidden), CPU, fitted), batch_tokens=size * 32
        )

    fitted = 12 // size
    assert on_ranks(size, used) == [[0, 1, *range(fitted, 16 // size)]] * size


def test_the_batches_of_steps_are_the_same_under_every_strategy() -> None:
    """Where forwards are collective too, which keep all batches: the steps visit the first ones alone."""
    windows = calibration_batches([{"input_ids": torch.ones(1, 32, dtype=torch.long)}] * 16)
    config = PruningConfig(preset="paper", method="magnitude", reconstruction_steps=2)
    context = make_context(build_model("llama"), config)
    cache = capture(context, windows, 12)
    assert _batches_of_steps(context, cache, 64) == ([0, 1, 2, 3], 2)


def test_windows_that_tuning_does_not_use_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps visit two of six fitted windows. Magnitude pruning uses none."""
    tune_with(monkeypatch, batch_tokens=32)
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[2:6] = ids[2:6].flip(0)
    found = []
    for windows in (ids, other):
        model = build_model("llama")
        config = PruningConfig(
            preset="paper",
            method="magnitude",
            reconstruction_steps=2,
            calibration_val_fraction=0.25,
            num_calibration_samples=8,
        )
        report = prune_model(model, windows.split(4), config)
        found.append((state_of(model), [block["reconstruction"] for block in report.blocks]))
    assert any(result["steps"] for result in found[0][1])
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][key]) for key, tensor in found[0][0].items())


def test_gradients_in_float16() -> None:
    """They do not vanish where hidden states are large: those of all parameters are near those in float32."""
    found: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.float16):
        case = make_case("llama", dtype=dtype)
        more = [15 * hidden for hidden in case.cache.hidden]  # which the block passes through
        case.cache.hidden = [hidden + plus for hidden, plus in zip(case.cache.hidden, more, strict=True)]
        case.goal[:] = [goal + plus for goal, plus in zip(case.goal, more, strict=True)]
        tuned = case.reconstructor(4)
        with tuned.parameters.trainable([case.block.module]):
            tuned._add_gradients(list(range(len(case.cache.hidden))))
        found.append([])
        for local, kept, values in zip(
            *(getattr(tuned.parameters, n) for n in ("locals", "kept", "values")), strict=True
        ):
            assert values.grad is not None
            places = slice(None) if kept is None else kept.long()  # which differ a little, because rounding makes ties
            found[-1].append(torch.zeros(local.numel()))
            found[-1][-1][places] = values.grad
    for exact, coarse in zip(*found, strict=True):
        assert float(torch.cosine_similarity(exact, coarse, dim=0)) > 0.98
        assert 0.9 < float(coarse.norm() / exact.norm()) < 1.1


def test_a_weight_that_two_blocks_share_stays_as_it_is() -> None:
    """Tuning it for the second block would change the first, which is finished."""
    model = build_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    before = layers[1].mlp.up_proj.weight.detach().clone()
    settings: dict[str, Any] = {"ignore": ["up_proj"], "calibration_val_fraction": 0.0}
    prune_model(
        model, random_batches(), PruningConfig(preset="fast", sparsity=0.6, num_calibration_samples=8, **settings)
    )
    assert torch.equal(before, layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("counts", [[2] + [64] * 31, [64] + [2] * 63, [64] * 8])
def test_the_beginning_of_windows_of_unequal_length(counts: list[int]) -> None:
    valid: list[Tensor | None] = [(torch.arange(64) < count)[None] for count in counts]
    cache = ActivationCache([torch.zeros(1, 64, 4) for _ in counts], [], valid, torch.device("cpu"), len(counts))
    found = cache.beginning(128, SINGLE)
    assert len(found.hidden) <= 8
    assert found.tokens in ((128, 130) if counts[1] == 64 else (78,)), "few positions, if their tokens are padding"


def test_steps_of_unequal_windows_have_the_tokens_that_are_asked_for() -> None:
    """Also if the largest batch has many times the tokens of the others."""
    lengths = [32] + [4, 5, 6] * 10
    windows = calibration_batches([{"input_ids": torch.ones(1, length, dtype=torch.long)} for length in lengths])
    context = make_context(build_model("llama"), PruningConfig(preset="fast"))
    cache = capture(context, windows, len(lengths))
    steps = in_random_order(*_batches_of_steps(context, cache, 32), torch.Generator())
    fitted = cache.fitted_tokens_by_batch()
    tokens = [sum(fitted[index] for index in chosen) for chosen in islice(steps, 30)]
    assert 24 < sum(tokens) / len(tokens) < 40
