"""The damage of pruning one part to the model's output, against plain ``transformers``; and the sparsities that follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import LAYOUTS, calibration_batches, make_context, state_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.allocation import allocate, sensitivity
from sparsellm_lightning.allocation.divergence import OutputProbe
from sparsellm_lightning.allocation.rules import Curve, minimise_damage
from sparsellm_lightning.architecture import DecoderLayout, Projection, describe
from sparsellm_lightning.calibration import capture
from sparsellm_lightning.data import CalibrationBatch, equally_many, first_tokens, take_windows
from sparsellm_lightning.models import vocabulary
from sparsellm_lightning.solvers import LOCAL_SOLVERS, SINGLE, InputStatistics, Ranks, Unstructured

Trained = Callable[[str], PreTrainedModel]
Batch = dict[str, Tensor]


def allocated(
    model: PreTrainedModel, batches: list[CalibrationBatch], config: PruningConfig, ranks: Ranks = SINGLE
) -> dict[str, float]:
    context = make_context(model, config, ranks)
    with torch.no_grad():
        return allocate(context, capture(context, batches, 0), batches)


def damages_of(model: PreTrainedModel, batches: list[CalibrationBatch], config: PruningConfig) -> list[Curve]:
    context = make_context(model, config)
    with torch.no_grad():
        return list(sensitivity._damages(context, capture(context, batches, 0), batches))


def random_windows(windows: int = 6, length: int = 24) -> list[CalibrationBatch]:
    ids = torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))
    return calibration_batches([{"input_ids": part} for part in ids.split(2)])


def pruned_of(layout: DecoderLayout) -> list[Projection]:
    return [p for p in layout.projections() if p.pruned]


def zeros_of(projection: Projection, sparsities: dict[str, float]) -> float:
    return sparsities[projection.name] * projection.parameter.numel()


@pytest.mark.parametrize(
    ("name", "allocation", "ignore"),
    [
        *(("llama", rule, ()) for rule in ("owl", "atp", "kl", "kl_blocks")),
        *(
            ("llama", rule, ("*.1.*", "*.0.self_attn.q_proj", "down_proj"))
            for rule in ("owl", "atp", "kl", "kl_blocks")
        ),
        *((name, "kl", ("*.1.*",)) for name in ("gemma3", "gpt2")),
    ],
)
def test_sum_of_zeros(name: str, allocation: Any, ignore: tuple[str, ...]) -> None:
    """The zeros add up to the share asked for, to the weight. The model is as it was before.

    Ignored projections get no sparsity. All sparsities are within their bounds.
    """
    model = build_model(name)
    before = state_of(model)
    config = PruningConfig(
        preset="paper", sparsity=0.63, method="sparsegpt", allocation=allocation, ignore=ignore, allocation_spread=0.07
    )
    sparsities = allocated(model, random_windows(), config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    layout = describe(model, config)
    chosen = {p.name: p for p in layout.projections() if p.pruned}
    assert set(sparsities) == set(chosen)
    zeros = [zeros_of(p, sparsities) for p in chosen.values()]
    assert all(abs(count - round(count)) < 1e-6 for count in zeros), "whole weights"
    assert sum(map(round, zeros)) == round(0.63 * sum(p.parameter.numel() for p in chosen.values()))
    width = {p.name: 1 / p.parameter.numel() for p in chosen.values()}
    if allocation != "kl":
        for block in layout.blocks:
            values = [sparsities[p.name] for p in block.projections() if p.pruned]
            assert max(values, default=0) - min(values, default=0) <= 2 * max(width.values()), "by block"
    if allocation.startswith("kl") or (
        allocation == "atp" and not ignore
    ):  # the others fix the range's width, not its middle
        assert all(0.56 - width[name] <= value <= 0.70 + width[name] for name, value in sparsities.items())
    assert len({round(value, 3) for value in sparsities.values()}) > 1
    assert max(sparsities.values()) - min(sparsities.values()) <= 0.14 + 1e-3


def test_pruning_uses_the_allocated_sparsities() -> None:
    model, windows = build_model("llama"), random_windows()
    config = PruningConfig(
        preset="paper",
        sparsity=0.7,
        method="sparsegpt",
        allocation="kl",
        ignore=["*.2.mlp.*"],
        num_calibration_samples=6,
    )
    expected = allocated(build_model("llama"), windows, config)
    assert len(set(expected.values())) > 1
    report = prune_model(model, [batch.inputs for batch in windows], config)
    for p in describe(model, config).projections():
        assert int((p.parameter == 0).sum()) == round(zeros_of(p, expected) if p.pruned else 0), p.name
    pruned = pruned_of(describe(model, config))
    zeros = sum(int((p.parameter == 0).sum()) for p in pruned)
    assert zeros == round(0.7 * sum(p.parameter.numel() for p in pruned))
    assert "allocation" in report.phases


def inputs_of(model: PreTrainedModel, modules: list[nn.Module], batches: list[Batch]) -> list[Tensor]:
    """The input of each module without padding, (tokens, features) float64."""
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
    """Of each of the first windows, the first tokens that count. Every window is a batch of its own."""
    rows = [(ids, mask) for batch in batches for ids, mask in zip(*batch.values(), strict=True)][:windows]
    found = []
    for ids, mask in rows:
        start = min(int(mask.nonzero()[0]), len(ids) - length)
        columns = slice(start, start + length)
        found.append({"input_ids": ids[None, columns], "attention_mask": mask[None, columns]})
    return found


def test_damages_from_a_sample_of_the_vocabulary(
    trained: Trained, padded: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are near those from all of it."""
    config = PruningConfig(preset="paper", sparsity=0.6, method="sparsegpt", allocation="kl")
    windows = calibration_batches(padded)
    whole = [damages[1] for _, damages in damages_of(trained("llama"), windows, config)]
    monkeypatch.setattr(vocabulary, "LIKELY", 8)
    monkeypatch.setattr(vocabulary, "OTHERS", 64)
    sampled = [damages[1] for _, damages in damages_of(trained("llama"), windows, config)]
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [pytest.param(512, 128, marks=pytest.mark.slow), pytest.param(12 * 16, 16, marks=pytest.mark.slow), (1, 128)],
)
def test_damages_against_plain_transformers(
    trained: Trained, padded: list[Batch], tokens: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each projection is pruned alone in a copy of the model, whose output is compared with the dense model's.

    The outputs are those of the beginnings of some windows. The local errors are those of all windows.
    """
    monkeypatch.setattr("sparsellm_lightning.allocation.divergence.OUTPUT_TOKENS", tokens)
    monkeypatch.setattr("sparsellm_lightning.allocation.divergence.OUTPUT_LENGTH", length)
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
    curves = damages_of(dense, calibration_batches(padded), config)
    chosen = pruned_of(describe(dense, config))
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
            pruned = LOCAL_SOLVERS["sparsegpt"](weight.clone(), statistics, Unstructured(sparsity))
            errors.append(float((y - x @ pruned.double().T).square().sum() / y.square().sum()))
            if sparsity == config.sparsity:
                plain.get_parameter(f"{p.name}.weight").data.copy_(pruned)
        divergence = F.kl_div(log_probabilities(plain, probed), reference, log_target=True, reduction="batchmean")
        divergences.append(float(divergence))
        assert sparsities == pytest.approx([0.5, 0.6, 0.7])
        assert damages[1] == pytest.approx(divergences[-1], rel=0.02), divergences
        assert damages == pytest.approx([damages[1] * error / errors[1] for error in errors], rel=1e-2)
    assert max(divergences) > 2 * min(divergences), "the projections differ"


@pytest.mark.parametrize("pattern", ["unstructured", {"parameters": 0.8}])
def test_an_interruption_leaves_the_dense_model(pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, for one. The next run would take the part that is pruned for dense."""
    model, ids = build_model("llama"), torch.randint(1, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    before, divergence, calls = state_of(model), OutputProbe.divergence, [0]
    allocation: Any = "kl_blocks" if pattern == "unstructured" else "uniform"
    config = PruningConfig(preset="paper", method="sparsegpt", allocation=allocation, pattern=pattern, sparsity=None)

    def counts(self: OutputProbe, *args: Any) -> float:
        calls[0] += 1
        if calls[0] == failing:
            raise torch.OutOfMemoryError("no room")
        return divergence(self, *args)

    monkeypatch.setattr(OutputProbe, "divergence", counts)
    failing = 0
    prune_model(build_model("llama"), [ids], config)
    for failing in range(1, calls[0] + 1):
        calls[0] = 0
        with pytest.raises(Exception, match="no room"):
            prune_model(model, [ids], config)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), failing


@pytest.mark.parametrize("tokens", [1, 36, 10_000])
def test_tokens_that_outputs_are_compared_on(tokens: int) -> None:
    """The beginnings of the first windows, for any batches and any number of ranks. Shorter windows are left out."""
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


def test_a_harmless_part_is_pruned_most() -> None:
    model = build_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(1e-6)
    config = PruningConfig(preset="paper", sparsity=0.6, method="sparsegpt", allocation="kl", allocation_spread=0.2)
    sparsities = allocated(model, random_windows(), config)
    for name, value in sparsities.items():
        if ".1.self_attn." in name:
            assert value == pytest.approx(0.8, abs=1e-3)
    others = [value for name, value in sparsities.items() if ".1.self_attn." not in name]
    assert min(others) < 0.6


def test_a_harmless_block_is_pruned_most() -> None:
    model = build_model("llama")
    for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        projection.weight.data.mul_(1e-6)
    config = PruningConfig(
        preset="paper", sparsity=0.6, method="sparsegpt", allocation="kl_blocks", allocation_spread=0.2
    )
    for name, value in allocated(model, random_windows(), config).items():
        assert (value == pytest.approx(0.8, abs=1e-3)) == (".1." in name), name


def test_damage_in_early_blocks_weighs_less() -> None:
    """Only if blocks are tuned to the dense model's output: then by 1/e in the first block, and not in the last."""
    settings: dict[str, Any] = {"preset": "paper", "sparsity": 0.6, "method": "sparsegpt", "allocation": "kl"}
    settings["solver_precision"] = "float32"  # with tuning, forwards would be bfloat16
    curves = damages_of(build_model("llama"), random_windows(), PruningConfig(**settings))
    chosen = list(describe(build_model("llama")).projections())
    sizes = [p.parameter.numel() for p in chosen]
    results = []
    for target, weights in (("model", [math.exp(-1), math.exp(-0.5), 1.0]), ("block", [1.0, 1.0, 1.0])):
        weighted = [
            (at, [weights[index // 7] * damage for damage in damages]) for index, (at, damages) in enumerate(curves)
        ]
        expected = minimise_damage(weighted, sizes, 0.6, [0.45] * 21, [0.75] * 21)
        config = PruningConfig(**settings, reconstruction_steps=4, target=target)
        found = allocated(build_model("llama"), random_windows(), config)
        results.append([found[p.name] for p in chosen])
        assert results[-1] == pytest.approx(expected, abs=1e-3)
    assert results[0] != pytest.approx(results[1], abs=1e-2), "the two targets differ"


def test_depth_and_outliers(trained: Trained, padded: list[Batch]) -> None:
    """ATP's sparsity rises with depth. OWL's falls with the share of a block's scores above five times their mean."""
    model, found = trained("llama"), {}
    for rule in ("atp", "owl"):
        config = PruningConfig(preset="paper", sparsity=0.6, method="wanda", allocation=rule, allocation_spread=0.1)
        sparsities = allocated(model, calibration_batches(padded), config)
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
    for rule in ("atp", "owl", "kl", "kl_blocks"):
        config = PruningConfig(preset="paper", method="magnitude", allocation=rule, allocation_spread=0.0)
        assert set(allocated(build_model("llama"), random_windows(), config).values()) == {0.5}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str) -> None:
    """In bfloat16, the weights come back bit-equal. Near sparsity 0 and 1, the spread is limited."""
    model = build_model(name).bfloat16()
    before = state_of(model)
    for sparsity in (0.05, 0.95):
        config = PruningConfig(preset="paper", sparsity=sparsity, method="magnitude", allocation="kl")
        sparsities = allocated(model, random_windows(4, 16), config)
        spread = min(0.15, 0.5 * (1 - sparsity))
        assert all(max(sparsity - spread, 0) - 2e-3 <= s <= sparsity + spread + 2e-3 for s in sparsities.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("allocation", ["owl", "kl", "kl_blocks"])
@pytest.mark.parametrize("windows", [7, 1])
def test_ranks_give_the_result_of_one_process(allocation: Any, windows: int) -> None:
    """The ranks have unequal numbers of windows. If there is one window, the second rank has none."""
    ids = torch.cat([batch.inputs["input_ids"] for batch in random_windows(8)])[:windows]
    dense = build_model("llama")
    config = PruningConfig(preset="paper", method="wanda", allocation=allocation, solver_precision="float32")

    def work(ranks: Ranks) -> dict[str, float]:
        batches, _ = take_windows([ids], windows, ranks, torch.device("cpu"), batch_tokens=24)
        return allocated(copy.deepcopy(dense), batches, config, ranks)

    single = work(SINGLE)
    for sparsities in on_ranks(2, work):
        assert sparsities == pytest.approx(single, abs=1e-3)


@pytest.mark.parametrize("settings", [{"allocation": "kl"}, {"pattern": "blocks"}, {"pattern": {"parameters": 0.7}}])
def test_a_model_without_a_head(settings: dict[str, Any]) -> None:
    """It has no next-token distribution to compare."""
    model: Any = build_model("llama").base_model
    config = PruningConfig(preset="paper", method="magnitude", **settings)
    with pytest.raises(UserError, match=r"allocation kl and kl_blocks, .* LlamaModel has no language-model head"):
        prune_model(model, [batch.inputs for batch in random_windows()], config)


@pytest.mark.parametrize("allocation", ["owl", "atp", "kl_blocks"])
def test_little_sparsity(allocation: Any) -> None:
    """The spread is limited so that no part gets less than none."""
    config = PruningConfig(preset="fast", sparsity=0.1, allocation=allocation)
    model, windows = build_model("gpt2"), random_windows()
    found = allocated(model, windows, config)
    layout = describe(model, config)
    assert all(0 <= s <= 1 for s in found.values())
    if allocation == "atp":
        assert max(found.values()) - min(found.values()) == pytest.approx(0.1, abs=1e-3)
    total = sum(zeros_of(p, found) for p in pruned_of(layout))
    assert total == pytest.approx(0.1 * sum(p.parameter.numel() for p in pruned_of(layout)), abs=1)


def test_parts_that_have_the_sparsity_already_are_not_free() -> None:
    """A later stage of gradual pruning: pruning to what a part has changes nothing, but pruning further does."""
    config = PruningConfig(preset="paper", method="sparsegpt", sparsity=0.6, allocation="kl_blocks")
    model = build_model("llama")
    prune_model(model, [batch.inputs for batch in random_windows()], replace(config, allocation="uniform"))
    context = replace(make_context(model, config), keep_zeros=True)
    with torch.no_grad():
        batches = random_windows()
        curves = list(sensitivity._damages(context, capture(context, batches, 0), batches))
    assert curves
    for at, damages in curves:
        assert at[1] == 0.6
        assert damages[0] == damages[1] == 0
        assert damages[2] > 0


@pytest.mark.parametrize("allocation", ["owl", "kl", "kl_blocks"])
def test_a_later_stage_has_the_sparsity_asked_for(allocation: Any) -> None:
    """Although some parts have more zeros than the allocation gives them."""
    model = build_model("llama")
    blocks = describe(model).blocks
    with torch.no_grad():
        for block, share in zip(blocks, (0.7, 0.2, 0.5), strict=True):
            for p in block.projections():
                zeros = torch.rand(p.matrix.shape, generator=torch.Generator().manual_seed(0)) < share
                p.parameter.masked_fill_(zeros, 0)
    config = PruningConfig(preset="paper", method="sparsegpt", sparsity=0.55, allocation=allocation)
    windows = [batch.inputs for batch in random_windows()]
    report = prune_model(model, windows, config, keep_zeros=True)
    assert report.sparsity["achieved"] == pytest.approx(0.55, abs=2e-3)
    assert all(float((p.matrix == 0).double().mean()) > 0.69 for p in blocks[0].projections())


def test_zeros_of_one_projection_do_not_raise_the_others() -> None:
    """Of a block whose projections have unequal zeros."""
    model = build_model("llama")
    first = next(iter(describe(model).projections()))
    with torch.no_grad():
        first.parameter.zero_()
    config = PruningConfig(preset="paper", method="sparsegpt", sparsity=0.5, allocation="kl_blocks")
    report = prune_model(model, [batch.inputs for batch in random_windows()], config, keep_zeros=True)
    assert report.sparsity["achieved"] == pytest.approx(0.5, abs=2e-3)
    others = [layer["sparsity"] for layer in report.layers if layer["name"] != first.name]
    assert max(others) < 0.7


def test_ranks_draw_the_same_sample_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as one process does, although each rank sees its own windows, the third none."""
    monkeypatch.setattr(vocabulary, "LIKELY", 2)
    monkeypatch.setattr(vocabulary, "OTHERS", 8)
    config = PruningConfig(preset="paper", method="magnitude", allocation="kl", sparsity=0.5)
    model = build_model("llama")

    def sample_of(ranks: Ranks) -> list[int]:
        context = make_context(copy.deepcopy(model), config, ranks)
        mine, _ = take_windows([batch.inputs for batch in random_windows(2)], 2, ranks, torch.device("cpu"))
        with torch.no_grad():
            sample = OutputProbe(context, mine)._sample
        assert sample is not None
        return sample.tokens.tolist()

    alone = sample_of(SINGLE)
    assert len(alone) < VOCABULARY
    assert on_ranks(3, sample_of) == [alone] * 3


@pytest.mark.parametrize("allocation", ["owl", "kl_blocks"])
def test_gate_and_up_of_an_expert_share_their_statistics(allocation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of each expert are chosen twice: for gate and up, and for down."""
    model, chosen, of = build_model("mixtral"), [], sensitivity.RoutedTokens.of

    def counted(routed: Any, expert: int, **options: Any) -> Any:
        chosen.append((id(routed), expert))
        return of(routed, expert, **options)

    monkeypatch.setattr(sensitivity.RoutedTokens, "of", counted)
    allocated(model, random_windows(), PruningConfig(sparsity=0.6, allocation=allocation))
    experts = len(model.model.layers) * model.config.num_local_experts
    assert len(chosen) == 2 * experts
