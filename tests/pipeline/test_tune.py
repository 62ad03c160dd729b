"""Masked reconstruction against plain Adam on a copy of the block, and what it must leave alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import CONFIGS, VOCABULARY, build_model
from support.ranks import on_ranks
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import LoraOptions, PruningConfig, TextDataModule, perplexity, prune_model
from sparsellm_lightning.architecture import Block, describe
from sparsellm_lightning.config import Reconstruction
from sparsellm_lightning.data import CalibrationBatch, take_windows
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.pipeline.tune import Reconstructor, batches_of_interest
from sparsellm_lightning.solvers import SINGLE, Ranks
from sparsellm_lightning.sparsity import add_adapters

Batch = dict[str, Tensor]
Trained = Callable[[str], PreTrainedModel]

# Of random_batches(): windows 0 to 4 of eight, which lie in batches of 3, 3 and 2; their tokens in the larger batch.
FITTED, LARGEST = 5, 22 + 32 + 32


@pytest.fixture(autouse=True)
def _without_measuring_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsellm_lightning.pruning.gemm_peak", lambda *args: 1e12)


@dataclass
class Case:
    """The middle block of a model, half pruned by hand, that is to give what it gave when dense."""

    model: PreTrainedModel
    block: Block
    walker: Walker
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # that plain transformers makes of the block, by batch
    goal: list[Tensor]
    valid: list[Tensor]

    def reconstructor(self, autocast: torch.dtype | None = None, **options: Any) -> Reconstructor:
        options = {"batch_tokens": 2 * LARGEST, **options}
        stream, adapter = self.walker.stream, self.walker.adapter
        return Reconstructor(self.block, stream, self.goal, adapter, Reconstruction(**options), autocast)


def make_case(name: str, fitted: int | None = None, dtype: torch.dtype = torch.float32) -> Case:
    model, batches, config = build_model(name), random_batches(), PruningConfig(preset="paper")
    nn.Module.to(model, dtype)
    walker = Walker(describe(model, config), config, StrategyAdapter())
    block = walker.layout.blocks[1]
    valid = [batch["attention_mask"].bool() for batch in batches]
    walker.enter([CalibrationBatch(*each) for each in zip(batches, valid, strict=True)], fitted)
    calls, goal = [], []
    handles = [
        block.module.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True),
        block.module.register_forward_hook(lambda _, args, output: goal.append(output_of(output))),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    walker.stream.hidden = [args[0] if args else kwargs["hidden_states"] for args, kwargs in calls]
    prune_by_hand(block)
    return Case(model, block, walker, calls, goal, valid)


def output_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def prune_by_hand(block: Block) -> None:
    for p in block.projections():
        small = p.parameter.detach().abs().flatten().float().kthvalue(p.parameter.numel() // 2).values
        p.parameter.data.masked_fill_(p.parameter.abs() <= small, 0)


def adam_by_hand(case: Case, fitted: int, steps: int, rate: float, others: bool) -> nn.Module:
    """The textbook: Adam on all fitted tokens, pruned weights set to zero again after every step."""
    module = copy.deepcopy(case.block.module)
    pruned = {f"{p.name}.weight".removeprefix(f"{case.block.name}.") for p in case.block.projections()}
    parameters = {n: p for n, p in module.named_parameters() if others or n in pruned}
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
        output = torch.cat([output_of(module(*args, **kwargs)) for args, kwargs in case.calls])[:fitted][valid]
        wanted = torch.cat(case.goal)[:fitted][valid]
        losses = [
            (is_ - should).square().sum() / should.square().sum() for is_, should in zip(output, wanted, strict=True)
        ]
        (sum(losses, torch.zeros(())) / len(losses)).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
    return module


def naive_error(case: Case, module: nn.Module, windows: slice) -> float:
    """``Σ min(‖B(h) − g‖²w, 1) / Σ min(‖h − g‖²w, 1)``, ``w = 1/‖g‖²``, token by token."""
    error = scale = 0.0
    with torch.no_grad():
        output = torch.cat([output_of(module(*args, **kwargs)) for args, kwargs in case.calls])
    for b, h, g, valid in zip(
        output[windows].double(),
        torch.cat(case.walker.stream.hidden)[windows].double(),
        torch.cat(case.goal)[windows].double(),
        torch.cat(case.valid)[windows],
        strict=True,
    ):
        for token in valid.nonzero().flatten().tolist():
            size = float(g[token].square().sum())
            error += min(float((b[token] - g[token]).square().sum()) / size, 1)
            scale += min(float((h[token] - g[token]).square().sum()) / size, 1)
    return error / scale


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def tune(reconstructor: Reconstructor) -> tuple[list[tuple[float, float]], int]:
    return reconstructor.tune()


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-350m", "gpt2"])
@pytest.mark.parametrize("fitted", [None, FITTED])
def test_against_plain_adam(name: str, fitted: int | None) -> None:
    """All batches in every step, so that their order does not matter; the block's norms and biases too."""
    case, windows = make_case(name, fitted), 8 if fitted is None else fitted
    steps, rate = 20, 3e-3
    before = copy.deepcopy(case.block.module)
    expected = adam_by_hand(case, windows, steps, rate, others=True)
    tokens = int(torch.cat(case.valid).sum()) if fitted is None else 2 * LARGEST
    reconstructor = case.reconstructor(steps=steps, learning_rate=rate, batch_tokens=tokens)
    errors, kept = tune(reconstructor)
    assert kept == steps
    wanted = expected.state_dict()
    for key, found in case.block.module.state_dict().items():
        # The softmax does not see a bias of all keys: its gradient is rounding, which Adam makes steps of.
        if name.startswith("opt") and key.endswith("k_proj.bias"):
            continue
        keys = slice(64, 128) if key.endswith("c_attn.bias") else slice(0)
        found, theirs = found.clone(), wanted[key].clone()
        found[keys], theirs[keys] = 0, 0
        assert torch.allclose(found, theirs, rtol=1e-5, atol=1e-5), key
    for found_errors, module in zip(errors, (before, expected), strict=True):
        assert found_errors[0] == pytest.approx(naive_error(case, module, slice(windows)), rel=1e-3)
        if fitted is None:
            assert math.isnan(found_errors[1])
        else:
            assert found_errors[1] == pytest.approx(naive_error(case, module, slice(windows, None)), rel=1e-3)


def test_only_weights_without_others() -> None:
    """In a block with biases everywhere."""
    case = make_case("opt")
    model, outside = state_of(case.model), f"{case.block.name}."
    expected = adam_by_hand(case, 8, 4, 3e-3, others=False)
    tune(case.reconstructor(steps=4, learning_rate=3e-3, others=False, batch_tokens=3 * LARGEST))
    weights = {f"{p.name}.weight" for p in case.block.projections()}
    for key, tensor in case.model.state_dict().items():
        if key in weights:
            theirs = expected.state_dict()[key.removeprefix(outside)]
            torch.testing.assert_close(tensor, theirs, rtol=1e-5, atol=1e-5)
            assert not torch.equal(tensor, model[key]), key
        else:
            assert torch.equal(tensor, model[key]), key


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "gemma2"])
def test_what_is_left_alone(name: str, autocast: torch.dtype | None) -> None:
    """Everything outside the block; and inside what the parameters had: whether they train, and their gradients."""
    case = make_case(name, FITTED)
    parameters = dict(case.model.named_parameters())
    for index, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    had = {key: (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for key, p in parameters.items()}
    before = state_of(case.model)
    errors, kept = tune(case.reconstructor(autocast, steps=8))
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
def test_a_step_too_large_changes_nothing(fitted: int | None) -> None:
    case = make_case("opt", fitted)
    before = state_of(case.model)
    errors, kept = tune(case.reconstructor(steps=4, learning_rate=10.0))
    assert kept == 0
    assert errors[0][0] == errors[1][0]
    assert errors[0][1] == errors[1][1] or fitted is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in case.model.state_dict().items())


def test_held_out_tokens_decide() -> None:
    """The pruned block already gives what held-out windows want, so that tuning it on the others can only do harm."""
    for fitted, expected in ((FITTED, 0), (8, 8)):
        case = make_case("llama", fitted)
        with torch.no_grad():
            now = [output_of(case.block.module(*args, **kwargs)) for args, kwargs in case.calls]
        first, second = slice(0, 2), slice(2, None)  # of the middle batch
        case.goal = [case.goal[0], torch.cat([case.goal[1][first], now[1][second]]), now[2]]
        errors, kept = tune(case.reconstructor(steps=8, learning_rate=1.5e-2, batch_tokens=10**3))
        assert kept == expected
        assert errors[0][1] == pytest.approx(0, abs=1e-10) or fitted == 8
        assert errors[1][0] < errors[0][0] or fitted == FITTED


def test_a_wild_token_does_not_decide() -> None:
    """One of the held-out tokens, whose error is a million times the others' and grows with every step."""
    usual = make_case("llama", FITTED)
    last = (len(usual.calls) - 1, -1)  # the last window, which has no padding
    assert usual.valid[last[0]][last[1]].all()

    def sizes(case: Case) -> Tensor:
        args, kwargs = case.calls[last[0]]
        with torch.no_grad():
            return output_of(case.block.module(*args, **kwargs))[last[1]].norm(dim=-1)

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


def test_the_best_look_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Every step is less than half a unit in the last place of weights above 0.01; together they are more."""
    moved = {}
    for steps in (1, 64):
        case = make_case("llama", dtype=torch.bfloat16)
        before = state_of(case.block.module)
        tune(case.reconstructor(steps=steps, learning_rate=1e-4, others=False))
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("pattern", "target"), [("unstructured", "model"), ("2:4", "block")])
def test_every_architecture(name: str, pattern: str, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every zero stays where the solver put it, and the hidden states carried along are those of the pruned model."""
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
    model = build_model(name)
    options = Reconstruction(steps=2, learning_rate=2e-3, batch_tokens=LARGEST)
    config = PruningConfig(preset="paper", pattern=pattern, target=target, method="magnitude", reconstruct=options)
    walker = Walker(describe(model, config), config, StrategyAdapter())
    assert_stream_is_the_model(walker, rtol=1e-3, atol=1e-4)
    assert len(tuned) == len(list(walker.layout.projections()))
    assert any(tuned)


@pytest.mark.parametrize(
    ("ignore", "target"),
    [("*.1.*", "block"), ("*.1.*", "model"), ("*.1.mlp.*", "block"), ("*.1.self_attn.*", "model")],
)
def test_skipped_projections(skip: str, target: Any) -> None:
    """A block of which nothing, or half, is pruned."""
    model, options = build_model("llama"), Reconstruction(steps=2, learning_rate=2e-3)
    dense = state_of(model)
    config = PruningConfig(preset="paper", method="magnitude", target=target, reconstruct=options, ignore=[skip])
    walker = Walker(describe(model, config), config, StrategyAdapter())
    assert_stream_is_the_model(walker, rtol=1e-3, atol=1e-4)
    for block in walker.layout.blocks:
        for p in block.projections():
            assert (float((p.parameter == 0).double().mean()) == 0.5) == p.pruned
        if not any(p.pruned for p in block.projections()):
            assert all(torch.equal(t, dense[f"{block.name}.{key}"]) for key, t in block.module.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    """Whatever token ids lie under it: the same weights, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (8, 24), generator=generator)
    mask = torch.ones_like(ids)
    (mask[1:4, :9] if side == "left" else mask[1:4, -9:]).zero_()
    options = Reconstruction(steps=3, batch_tokens=64, learning_rate=4e-3)
    config = PruningConfig(
        preset="paper", method="magnitude", target="model", reconstruct=options, num_calibration_samples=8
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


def test_adapters_are_not_tuned() -> None:
    """What peft froze is tuned and frozen again, what it added stays."""
    pytest.importorskip("peft")
    model = build_model("llama")
    add_adapters(model, LoraOptions(rank=2))
    before, trains = state_of(model), {key: p.requires_grad for key, p in model.named_parameters()}
    config = PruningConfig(
        preset="paper",
        method="magnitude",
        reconstruct=Reconstruction(steps=2, learning_rate=2e-3),
        num_calibration_samples=8,
    )
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
    target: Any, sparsity: float, trained: Trained, text: TextDataModule, calibration: list[Batch]
) -> None:
    found = []
    for options in (False, Reconstruction(steps=24, learning_rate=0.02, batch_tokens=1024)):
        model = trained("llama")
        config = PruningConfig(
            preset="paper",
            sparsity=sparsity,
            method="sparsegpt",
            target=target if options else "block",
            reconstruct=options,
            num_calibration_samples=64,
        )
        report = prune_model(model, calibration, config)
        found.append(perplexity(model, text.test_dataloader()))
        assert report.sparsity["achieved"] == pytest.approx(sparsity, abs=1e-4)
        assert report.calibration["held_out"] == (8 if options else 0)
        for block in report.blocks:
            tuned = block["reconstruction"]
            assert (tuned is None) == (not options)
            if tuned:
                assert tuned["steps"] > 0
                assert tuned["held_out"][1] < tuned["held_out"][0]
                assert tuned["fitted"][1] < tuned["fitted"][0]
    assert found[1] < 0.96 * found[0], found


@pytest.mark.parametrize(("windows", "fitted"), [(11, 8), (1, 1)])
def test_ranks_give_the_result_of_one_process(windows: int, fitted: int) -> None:
    """All fitted windows in every step; with one window a rank has none."""
    ids = torch.randint(0, VOCABULARY, (windows, 32), generator=torch.Generator().manual_seed(1))
    options = Reconstruction(steps=4, learning_rate=5e-4, batch_tokens=8 * 32)
    config, dense = (
        PruningConfig(preset="paper", method="magnitude", target="model", reconstruct=options),
        build_model("llama"),
    )

    def prune(ranks: Ranks) -> tuple[PreTrainedModel, list[Any]]:
        model, adapter = copy.deepcopy(dense), StrategyAdapter()
        adapter.ranks = ranks
        walker = Walker(describe(model, config), config, adapter)
        batches, _ = take_windows([ids], windows, ranks, torch.device("cpu"), batch_tokens=32)
        walker.enter(batches, len(range(ranks.rank, fitted, ranks.size)))
        return model, [result.reconstruction for result in walker.walk()]

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


def test_a_step_sees_no_window_twice() -> None:
    """More tokens a step than there are: all of them, once."""
    case = make_case("llama", FITTED)
    reconstructor = case.reconstructor(steps=2, batch_tokens=10**4)
    seen: list[int] = []
    original = reconstructor._forward
    reconstructor._forward = lambda index: (torch.is_grad_enabled() and seen.append(index), original(index))[1]  # type: ignore[method-assign]
    tune(reconstructor)
    fitted = [index for index, count in enumerate(reconstructor.fitted) if count]
    assert sorted(seen[: len(fitted)]) == sorted(seen[len(fitted) :]) == fitted


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_tuned_is_what_the_local_solver_gives(name: str) -> None:
    """With steps too small to change a weight, the weights are the local solver's without reconstruction, up to rounding."""
    states = []
    for options in (False, Reconstruction(steps=1, learning_rate=1e-30)):
        model, batches = build_model(name), random_batches()
        config = PruningConfig(
            preset="paper", sparsity=0.6, method="sparsegpt", reconstruct=options, calibration_val_fraction=0
        )
        walker = Walker(describe(model, config), config, StrategyAdapter())
        walker.enter([CalibrationBatch(batch, batch["attention_mask"].bool()) for batch in batches])
        for result in walker.walk():
            assert len(result.layer_errors) == len(list(walker.layout.blocks[result.index].projections()))
        states.append(state_of(model))
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
        assert torch.equal(states[1][key] == 0, tensor == 0), key


@pytest.mark.parametrize("size", [1, 2])
def test_only_what_will_be_looked_at_is_computed(size: int) -> None:
    """Two steps of one window on each rank: these, and those held out."""
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(1))
    config, dense = (
        PruningConfig(preset="paper", method="magnitude", reconstruct=Reconstruction(2, batch_tokens=size * 32)),
        build_model("llama"),
    )

    def goals(ranks: Ranks) -> tuple[list[int], list[int]]:
        model, adapter = copy.deepcopy(dense), StrategyAdapter()
        adapter.ranks = ranks
        walker = Walker(describe(model, config), config, adapter)
        batches, _ = take_windows([ids], 16, ranks, torch.device("cpu"), batch_tokens=32)
        walker.enter(batches, len(range(ranks.rank, 12, ranks.size)))
        assert config.reconstruct
        return batches_of_interest(walker.stream, config.reconstruct, adapter, torch.device("cpu")), [
            result.reconstruction["steps"] for result in walker.walk() if result.reconstruction
        ]

    results = [goals(SINGLE)] if size == 1 else on_ranks(2, goals)
    fitted = 12 // size
    for batches, steps in results:
        assert batches == [0, 1, *range(fitted, 16 // size)]
        assert steps == results[0][1]
        assert len(steps) == 3


def test_windows_of_no_interest_do_not_matter() -> None:
    """Neither for the tuning nor for what is held out; magnitude pruning does not look at them either."""
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[2:6] = ids[2:6].flip(0)
    options = Reconstruction(steps=2, batch_tokens=32)
    found = []
    for windows in (ids, other):
        model = build_model("llama")
        config = PruningConfig(
            preset="paper",
            method="magnitude",
            reconstruct=options,
            calibration_val_fraction=0.25,
            num_calibration_samples=8,
        )
        report = prune_model(model, windows.split(4), config)
        found.append((state_of(model), [block["reconstruction"] for block in report.blocks]))
    assert any(result["steps"] for result in found[0][1])
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][key]) for key, tensor in found[0][0].items())
