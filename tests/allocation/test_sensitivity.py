"""What each part's pruning does to the model's output, against plain ``transformers``; and the sparsities that follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import CONFIGS, VOCABULARY, build_model
from support.ranks import on_ranks
from test_journal import TUNED
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.allocation.rules import minimise_damage
from sparsellm_lightning.allocation.sensitivity import OUTPUT_LENGTH, OUTPUT_TOKENS, _damages, allocate
from sparsellm_lightning.architecture import DecoderLayout, Projection, describe
from sparsellm_lightning.data import CalibrationBatch, equally_many, first_tokens, take_windows
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.solvers import LOCAL_SOLVERS, SINGLE, InputStatistics, Ranks, Unstructured

Trained = Callable[[str], PreTrainedModel]
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _without_measuring_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsellm_lightning.pruning.gemm_peak", lambda *args: 1e12)


def enter(model: PreTrainedModel, batches: list[Batch], config: PruningConfig) -> Walker:
    walker = Walker(describe(model, config), config, StrategyAdapter())
    walker.enter([CalibrationBatch(b, b["attention_mask"].bool() if "attention_mask" in b else None) for b in batches])
    return walker


def allocated(model: PreTrainedModel, batches: list[Batch], config: PruningConfig) -> dict[str, float]:
    walker = enter(model, batches, config)
    with torch.no_grad():
        return allocate(walker.layout, walker.stream, walker.batches, config, walker.adapter)


def random_ids(windows: int = 6, length: int = 24) -> list[Batch]:
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.split(2)]


def pruned_of(layout: DecoderLayout) -> list[Projection]:
    return [p for p in layout.projections() if p.pruned]


def zeros_of(projection: Projection, sparsities: dict[str, float]) -> float:
    return sparsities[projection.name] * projection.parameter.numel()


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "gpt2"])
@pytest.mark.parametrize("allocation", ["owl", "atp", "error"])
@pytest.mark.parametrize("ignore", [(), ("*.1.*", "*.0.self_attn.q_proj", "down_proj")])
def test_the_share_asked_for(name: str, allocation: Any, skip: tuple[str, ...]) -> None:
    """To the weight; the model is as it was; what is skipped has no part in it; all is within bounds."""
    if skip and name != "llama":
        skip = ("*.1.*",)
    model = build_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = PruningConfig(
        preset="paper", sparsity=0.63, method="sparsegpt", allocation=allocation, ignore=skip, allocation_spread=0.07
    )
    sparsities = allocated(model, random_ids(), config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    layout = describe(model, config)
    chosen = {p.name: p for p in layout.projections() if p.pruned}
    assert set(sparsities) == set(chosen)
    zeros = [zeros_of(p, sparsities) for p in chosen.values()]
    assert all(abs(count - round(count)) < 1e-6 for count in zeros), "whole weights"
    assert sum(map(round, zeros)) == round(0.63 * sum(p.parameter.numel() for p in chosen.values()))
    width = {p.name: 1 / p.parameter.numel() for p in chosen.values()}
    if allocation != "error":
        for block in layout.blocks:
            values = [sparsities[p.name] for p in block.projections() if p.pruned]
            assert max(values, default=0) - min(values, default=0) <= 2 * max(width.values()), "by block"
    if allocation == "error" or (allocation == "atp" and not skip):  # the others fix the range's width, not its middle
        assert all(0.56 - width[name] <= value <= 0.70 + width[name] for name, value in sparsities.items())
    assert len({round(value, 3) for value in sparsities.values()}) > 1
    assert max(sparsities.values()) - min(sparsities.values()) <= 0.14 + 1e-3


def test_they_are_what_is_pruned(trained: Trained, calibration: list[Batch]) -> None:
    model = trained("llama")
    settings: dict[str, Any] = {"sparsity": 0.7, "method": "sparsegpt", "num_calibration_samples": 16}
    config = PruningConfig(preset="paper", allocation="kl", ignore=["*.2.mlp.*"], **settings)
    expected = allocated(trained("llama"), calibration[:1], config)
    report = prune_model(model, calibration, config)
    for p in describe(model, config).projections():
        assert int((p.parameter == 0).sum()) == round(zeros_of(p, expected) if p.pruned else 0), p.name
    pruned = pruned_of(describe(model, config))
    zeros = sum(int((p.parameter == 0).sum()) for p in pruned)
    assert zeros == round(0.7 * sum(p.parameter.numel() for p in pruned))
    assert "allocation" in report.phases


def inputs_of(model: PreTrainedModel, modules: list[nn.Module], batches: list[Batch]) -> list[Tensor]:
    """What each module is given, (tokens, features) float64, padding left out."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    valid: Tensor

    def see(index: int) -> Callable[..., None]:
        return lambda _, args: seen[index].append(args[0].reshape(*valid.shape, -1)[valid].double())

    handles = [module.register_forward_pre_hook(see(index)) for index, module in enumerate(modules)]
    with torch.no_grad():
        for batch in batches:
            valid = batch["attention_mask"].bool()
            model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


def log_probabilities(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """(valid tokens, vocabulary)."""
    with torch.no_grad():
        logits = [model(**batch).logits[batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(logits).double().log_softmax(-1)


@pytest.fixture
def padded(calibration: list[Batch]) -> list[Batch]:
    """Sixteen windows, some of them padded, in batches of four."""
    ids = calibration[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[2, 40:] = 0
    mask[9, :15] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


def beginnings(batches: list[Batch], windows: int, length: int) -> list[Batch]:
    """The first tokens that count of each of the first windows, a batch each."""
    rows = [(ids, mask) for batch in batches for ids, mask in zip(*batch.values(), strict=True)][:windows]
    found = []
    for ids, mask in rows:
        start = min(int(mask.nonzero()[0]), len(ids) - length)
        columns = slice(start, start + length)
        found.append({"input_ids": ids[None, columns], "attention_mask": mask[None, columns]})
    return found


@pytest.mark.parametrize(("tokens", "length"), [(OUTPUT_TOKENS, OUTPUT_LENGTH), (12 * 16, 16), (1, 128)])
def test_damages_against_plain_transformers(
    trained: Trained, padded: list[Batch], tokens: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every projection is pruned alone in a model of its own, and its output compared with the dense model's.

    The output of the beginnings of some windows; local errors are taken from all of them.
    """
    monkeypatch.setattr("sparsellm_lightning.sensitivity.OUTPUT_TOKENS", tokens)
    monkeypatch.setattr("sparsellm_lightning.sensitivity.OUTPUT_LENGTH", length)
    length = min(length, padded[0]["input_ids"].shape[1])
    probed = beginnings(padded, max(1, round(tokens / length)), length)
    dense = trained("llama")
    config = PruningConfig(
        preset="paper",
        sparsity=0.6,
        method="sparsegpt",
        allocation="kl",
        allocation_spread=0.1,
        solver_precision="float32",
        ignore=["*.1.mlp.up_proj"],
    )
    walker = enter(dense, padded, config)
    layers = LayerPruner(config, walker.adapter, Stopwatch())
    with torch.no_grad():
        curves = list(
            _damages(walker.layout, walker.stream, walker.batches, layers, config, walker.adapter, Stopwatch())
        )
    chosen = pruned_of(walker.layout)
    assert len(curves) == len(chosen) == 20
    reference = log_probabilities(trained("llama"), probed)
    divergences = []
    for (sparsities, damages), p in zip(curves, chosen, strict=True):
        plain = trained("llama")
        (x,) = inputs_of(plain, [plain.get_submodule(p.name)], padded)
        statistics = InputStatistics((x.T @ x / len(x)).float(), config.damping)
        weight = p.parameter.detach()
        y = x @ weight.double().T
        errors = []
        for sparsity in sparsities:
            pruned = LOCAL_SOLVERS["sparsegpt"](weight.clone(), statistics, Unstructured(sparsity), 128)
            errors.append(float((y - x @ pruned.double().T).square().sum() / y.square().sum()))
            if sparsity == config.sparsity:
                plain.get_parameter(f"{p.name}.weight").data.copy_(pruned)
        divergence = F.kl_div(log_probabilities(plain, probed), reference, log_target=True, reduction="batchmean")
        divergences.append(float(divergence))
        assert sparsities == pytest.approx([0.5, 0.6, 0.7])
        assert damages[1] == pytest.approx(divergences[-1], rel=0.02), divergences
        assert damages == pytest.approx([damages[1] * error / errors[1] for error in errors], rel=1e-2)
    assert max(divergences) > 2 * min(divergences), "there is something to tell apart"


@pytest.mark.parametrize("tokens", [1, 36, 10_000])
def test_tokens_that_outputs_are_compared_on(tokens: int) -> None:
    """The beginnings of the first windows, whatever batches and ranks they are in; shorter ones are left out."""
    ids = torch.arange(9 * 20).view(9, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, 15:] = mask[3, :14] = 0
    positions = torch.arange(20)[None]

    def split(ranks: Ranks, batch_tokens: int) -> list[CalibrationBatch]:
        whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        batches, _ = take_windows([whole], 9, ranks, torch.device("cpu"), batch_tokens=batch_tokens)
        short = torch.zeros(1, 3, dtype=torch.long)
        return [CalibrationBatch({"input_ids": short}, None), *equally_many(batches, ranks, torch.device("cpu"))]

    starts = [0, 5, 0, 8, 0, 0, 0, 0, 0][: min(max(1, round(tokens / 12)), 9)]
    expected = [list(range(20 * row + start, 20 * row + start + 12)) for row, start in enumerate(starts)]

    def work(ranks: Ranks, batch_tokens: int = 40) -> list[list[int]]:
        (found,) = first_tokens(split(ranks, batch_tokens), tokens, 12, ranks)
        assert found.valid is not None
        for row, valid in zip(found.inputs["input_ids"], found.valid, strict=True):
            where, start = divmod(int(row[0]), 20)
            assert torch.equal(row, ids[where, start : start + 12])
            assert not valid.any() or torch.equal(valid, mask[where, start : start + 12].bool())
        assert torch.equal(found.inputs["position_ids"], found.inputs["input_ids"] % 20)
        return found.inputs["input_ids"][found.valid.any(1)].tolist()

    for batch_tokens in (20, 40, 1000):
        assert work(SINGLE, batch_tokens) == expected
    for ranks in (2, 5):
        assert sorted(row for rows in on_ranks(ranks, work) for row in rows) == expected


def test_a_harmless_part_is_pruned_most(trained: Trained, calibration: list[Batch]) -> None:
    model = trained("llama")
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(1e-6)
    config = PruningConfig(preset="paper", sparsity=0.6, method="sparsegpt", allocation="kl", allocation_spread=0.2)
    sparsities = allocated(model, calibration[:2], config)
    for name, value in sparsities.items():
        if ".1.self_attn." in name:
            assert value == pytest.approx(0.8, abs=1e-3)
    others = [value for name, value in sparsities.items() if ".1.self_attn." not in name]
    assert min(others) < 0.6


def test_what_later_blocks_repair_weighs_less(trained: Trained, calibration: list[Batch]) -> None:
    """Where they are tuned to: an e-th in front, all of it behind. Elsewhere damages count as they are."""
    settings: dict[str, Any] = {"sparsity": 0.6, "method": "sparsegpt", "allocation": "kl"}
    plain = PruningConfig(**settings)
    walker = enter(trained("llama"), calibration[:2], plain)
    layers = LayerPruner(plain, walker.adapter, Stopwatch())
    with torch.no_grad():
        curves = list(
            _damages(walker.layout, walker.stream, walker.batches, layers, plain, walker.adapter, Stopwatch())
        )
    chosen = pruned_of(walker.layout)
    sizes = [p.parameter.numel() for p in chosen]
    results = []
    for extra, weights in (
        ({"reconstruct": TUNED, "target": "model"}, [math.exp(-1), math.exp(-0.5), 1.0]),
        ({"reconstruct": TUNED}, [1.0, 1.0, 1.0]),
    ):
        weighted = [
            (at, [weights[index // 7] * damage for damage in damages]) for index, (at, damages) in enumerate(curves)
        ]
        expected = minimise_damage(weighted, sizes, 0.6, [0.45] * 21, [0.75] * 21)
        found = allocated(trained("llama"), calibration[:2], PruningConfig(**settings, **extra))
        results.append([found[p.name] for p in chosen])
        assert results[-1] == pytest.approx(expected, abs=1e-3)
    assert results[0] != pytest.approx(results[1], abs=1e-2), "there is something to tell apart"


def test_depth_and_outliers(trained: Trained, padded: list[Batch]) -> None:
    """ATP goes up with depth; OWL down with the share of a block's scores above five times their mean."""
    model, found = trained("llama"), {}
    for rule in ("atp", "owl"):
        config = PruningConfig(preset="paper", sparsity=0.6, method="wanda", allocation=rule, allocation_spread=0.1)
        sparsities = allocated(model, padded, config)
        found[rule] = [sparsities[f"model.layers.{i}.mlp.up_proj"] for i in range(3)]
    assert found["atp"] == pytest.approx([0.5, 0.6, 0.7], abs=1e-3)
    shares = []
    for block in describe(model).blocks:
        projections = list(block.projections())
        scores = torch.cat(
            [
                (p.parameter.detach().double().abs() * x.square().sum(0).sqrt() / len(x) ** 0.5).flatten()
                for p, x in zip(projections, inputs_of(model, [p.module for p in projections], padded), strict=True)
            ]
        )
        shares.append(float((scores > 5 * scores.mean()).double().mean()))
    scaled = [(share - min(shares)) / (max(shares) - min(shares)) for share in shares]
    assert found["owl"] == pytest.approx([0.6 + 0.2 * (sum(scaled) / 3 - value) for value in scaled], abs=2e-3)


def test_no_spread_is_uniform() -> None:
    for rule in ("atp", "owl", "error"):
        config = PruningConfig(preset="paper", method="magnitude", allocation=rule, allocation_spread=0.0)
        assert set(allocated(build_model("llama"), random_ids(), config).values()) == {0.5}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name: str) -> None:
    """In bfloat16, in which the weights must come back too; at a sparsity whose bounds meet their limits."""
    model = build_model(name).bfloat16()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for sparsity in (0.05, 0.95):
        config = PruningConfig(preset="paper", sparsity=sparsity, method="magnitude", allocation="kl")
        sparsities = allocated(model, random_ids(4, 16), config)
        assert all(0 <= value < 1 for value in sparsities.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("allocation", ["owl", "error"])
@pytest.mark.parametrize("windows", [7, 1])
def test_ranks_give_the_result_of_one_process(allocation: Any, windows: int) -> None:
    """Windows are spread unevenly; with one of them a rank has none."""
    ids, dense = torch.cat([batch["input_ids"] for batch in random_ids(8)])[:windows], build_model("llama")
    config = PruningConfig(preset="paper", method="wanda", allocation=allocation, solver_precision="float32")

    def work(ranks: Ranks) -> dict[str, float]:
        model, adapter = copy.deepcopy(dense), StrategyAdapter()
        adapter.ranks = ranks
        walker = Walker(describe(model, config), config, adapter)
        batches, _ = take_windows([ids], windows, ranks, torch.device("cpu"), batch_tokens=24)
        walker.enter(batches)
        with torch.no_grad():
            return allocate(walker.layout, walker.stream, walker.batches, config, adapter)

    single = work(SINGLE)
    for sparsities in on_ranks(2, work):
        assert sparsities == pytest.approx(single, abs=1e-3)


def test_a_model_without_a_head() -> None:
    """There is no output to compare: said, rather than failed at."""
    model: Any = build_model("llama").base_model
    with pytest.raises(UserError, match="allocation"):
        prune_model(model, random_ids(), PruningConfig(preset="paper", method="magnitude", allocation="kl"))
