"""Mixtures of experts: which tokens an expert is solved on, against plain loops, and what pruning a trained one costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.batches import random_batches
from support.classes import tiny_model
from support.mixtures import with_listed_experts
from support.models import VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import assert_same_weights, calibration_batches, make_context
from support.training import OwnModule, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm_lightning import PruningConfig, SparseLLMCallback, perplexity, prune_model
from sparsellm_lightning.architecture import Experts, describe
from sparsellm_lightning.calibration import RoutedTokens, capture, feed_forward_of, run_block
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.pipeline import block, sequential
from sparsellm_lightning.pipeline.sequential import prune_blocks
from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    SINGLE,
    InputStatistics,
    Ranks,
    Unstructured,
    factorize,
    magnitude,
    solve_stacked,
    sparsegpt,
)


def experts_of(model: PreTrainedModel, block: int = 0) -> Experts:
    (found,) = (unit for unit in describe(model).blocks[block].units if isinstance(unit, Experts))
    return found


def routed_by_hand(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of the first block, for valid tokens: the experts' input (tokens, d), and the weight of each expert (tokens, experts).

    Mixtral's router: the softmax over all experts, of which the two largest are kept and divided by their sum.
    """
    block = model.model.layers[0]
    seen: list[Tensor] = []
    hook = block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    xs = []
    with torch.no_grad():
        for batch in random_batches():
            model(**batch)
            xs.append(seen.pop()[batch["attention_mask"].bool()])
    hook.remove()
    x = torch.cat(xs)
    shares = torch.softmax(x @ block.mlp.gate.weight.T, -1)
    weights = torch.zeros_like(shares)
    for token, row in enumerate(shares):
        first, second = sorted(range(len(row)), key=lambda expert: float(row[expert]))[-2:]
        total = row[first] + row[second]
        weights[token, first], weights[token, second] = row[first] / total, row[second] / total
    return x, weights


def routed(model: PreTrainedModel) -> RoutedTokens:
    context = make_context(model, PruningConfig(preset="paper"))
    batches = calibration_batches(random_batches())
    cache = capture(context, batches, sum(batch.windows for batch in batches))
    with torch.no_grad():
        return RoutedTokens(context, context.layout.blocks[0], cache, experts_of(model))


def test_tokens_of_an_expert() -> None:
    model = build_model("mixtral")
    x, weights = routed_by_hand(model)
    tokens = routed(model)
    for expert in range(4):
        mine = tokens.of(expert, borrowing_below=1)
        chosen = weights[:, expert] > 0
        assert not mine.borrows
        assert sum(mine.chunks) == len(mine.x) == int(chosen.sum())
        torch.testing.assert_close(mine.x, x[chosen], rtol=1e-4, atol=1e-5)
        squares = weights[chosen, expert].square()
        torch.testing.assert_close(mine.weights, squares / squares.mean(), rtol=1e-3, atol=1e-5)


def test_tokens_sorted_by_expert_are_stored_once() -> None:
    """Llama 4's experts module gets every token for every expert: zeros, where the token is not routed there."""
    model = tiny_model("llama4_text")
    context = make_context(model, PruningConfig(preset="paper"))
    block, experts = next((b, unit) for b in context.layout.blocks for unit in b.units if isinstance(unit, Experts))
    batches = calibration_batches([{"input_ids": torch.arange(64).view(4, 16) % 16}])
    seen: list[Tensor] = []
    hook = experts.observed.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with hook, torch.no_grad():
        cache = capture(context, batches, 4)
        for before in context.layout.blocks[: block.index]:
            cache.hidden = run_block(context, before, cache)
        seen.clear()
        tokens = RoutedTokens(context, block, cache, experts)
    assert tokens.routing is not None
    sorted_tokens = torch.cat([x.view(len(experts.networks), -1, x.shape[-1]) for x in seen], 1)
    for expert in range(len(experts.networks)):
        assert torch.equal(tokens.routing.of(expert)[0], sorted_tokens[expert])
    stored = tokens.routing.hidden.coalesce().values().numel()
    assert stored == int(sorted_tokens.any(-1).sum()) * sorted_tokens.shape[-1] < sorted_tokens.numel()
    counts = sorted_tokens.any(-1).sum(1)
    few = int(counts.argmax())
    mine = tokens.of(few, borrowing_below=10**6)
    assert not mine.borrows
    assert len(mine.x) == int(counts[few]) < sorted_tokens.shape[1], "rows of zeros are no tokens"
    assert torch.equal(mine.weights, torch.ones(len(mine.x)))


def test_an_expert_with_few_tokens_borrows_from_all() -> None:
    """Gram matrix: n/m of its own and 1 − n/m of that of all tokens."""
    model = build_model("mixtral")
    x, weights = routed_by_hand(model)
    mine = routed(model).of(2, borrowing_below=1000)
    assert mine.borrows
    n = int((weights[:, 2] > 0).sum())
    own = sum(w**2 * torch.outer(t, t) for t, w in zip(x, weights[:, 2], strict=True)) / weights[:, 2].square().sum()
    every = sum(torch.outer(t, t) for t in x) / len(x)
    gram = (mine.x * mine.weights[:, None]).T @ mine.x / len(mine.x)
    torch.testing.assert_close(gram, n / 1000 * own + (1 - n / 1000) * every, rtol=1e-3, atol=1e-5)


def test_an_expert_that_no_token_reaches() -> None:
    model = build_model("mixtral")

    def reroute(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen, weights = args
        return hidden, chosen.masked_fill(chosen == 1, 3), weights

    model.model.layers[0].mlp.experts.register_forward_pre_hook(reroute)
    steps = {"reconstruction_steps": 2, "distillation_steps": 2}
    config = PruningConfig(sparsity=0.5, allocation="uniform", num_calibration_samples=8, **steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_model(model, random_batches(), config)
    assert report.blocks[0]["borrowing_experts"] >= 1
    for p in experts_of(model).projections:
        matrix = p.matrix
        assert torch.isfinite(matrix).all()
        assert int((matrix == 0).sum()) == p.size // 2


def test_a_router_that_chooses_unequally_many_experts() -> None:
    """Those above a threshold: in some batches three for a token, in others two. Compared with one batch of all windows."""

    def mixture() -> PreTrainedModel:
        model = with_listed_experts(build_model("mixtral"), "above")
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.mul_(8)
        return model

    def found(batches: list[dict[str, Tensor]]) -> list[Tensor]:
        model = mixture()
        context = make_context(model, PruningConfig())
        cache = capture(context, calibration_batches(batches), sum(len(b["input_ids"]) for b in batches))
        tokens = RoutedTokens(context, context.layout.blocks[0], cache, experts_of(model))
        return [tensor for expert in range(4) for tensor in (tokens.of(expert, 1).x, tokens.of(expert, 1).weights)]

    ids = torch.randint(0, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))
    apart, together = found([{"input_ids": row[None]} for row in ids]), found([{"input_ids": ids}])
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_experts_have_auxiliaries_of_the_first_windows(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as other networks, which memory is planned for: here about half a token a hidden feature."""
    models = [build_model("mixtral") for _ in range(size)]
    for model in models:
        describe(model)  # its hooks are not made for ranks that are threads
    width = experts_of(models[0]).networks[0].roles["down"].shape[1]
    monkeypatch.setattr(block, "ALTERNATION_TOKENS", Fraction(1, 2))
    solve, seen = sequential.solve_feed_forward, []

    def noting(*args: Any, **options: Any) -> Any:
        chunks = options["chunks"]
        seen.append((options["ranks"].rank, sum(chunks[: options["leading_chunks"]]), sum(chunks)))
        return solve(*args, **options)

    monkeypatch.setattr(sequential, "solve_feed_forward", noting)
    config = PruningConfig(preset="paper", sparsity=0.5, num_iterations=3, calibration_val_fraction=0.0)

    def work(ranks: Ranks) -> None:
        windows = calibration_batches(random_batches(16, 32))[ranks.rank :: size]
        list(prune_blocks(make_context(models[ranks.rank], config, ranks), windows, sum(b.windows for b in windows)))

    on_ranks(size, work)
    for index in range(0, len(seen), size):
        together = sorted(seen, key=lambda entry: entry[0])  # by rank, in order of experts
        parts = [together[rank * len(seen) // size + index // size] for rank in range(size)]
        carrying, every = (sum(part[column] for part in parts) for column in (1, 2))
        assert carrying < every
        assert width / 2 - 32 <= carrying <= width / 2 + 2 * 32
    assert all(p.matrix.isfinite().all() for p in experts_of(models[0]).projections)


def test_local_solver_of_an_expert() -> None:
    """SparseGPT on the weighted Gram matrices, gate and up first, then down on what they give."""
    model = build_model("mixtral")
    context = make_context(model, PruningConfig(preset="paper"))
    dense = feed_forward_of(context, experts_of(model).networks[3])
    config = PruningConfig(
        preset="paper",
        method="sparsegpt",
        sparsity=0.5,
        num_calibration_samples=8,
        calibration_val_fraction=0.0,
        ignore=["self_attn.*"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune_model(model, random_batches(), config)
    # The first block's input does not depend on pruning, since attention stays dense.
    tokens = routed(build_model("mixtral")).of(3, borrowing_below=64)

    def solved(x: Tensor, weight: Tensor) -> Tensor:
        gram = (x * tokens.weights[:, None]).T.double() @ x.double() / len(x)
        return sparsegpt(weight, factorize(gram.float(), 0.01, "test"), Unstructured(0.5, SINGLE))

    ours = feed_forward_of(make_context(model, PruningConfig()), experts_of(model).networks[3])
    assert dense.gate is not None
    assert ours.gate is not None
    for found, before in ((ours.gate, dense.gate), (ours.up, dense.up)):
        expected = solved(tokens.x, before)
        assert ((found == 0) == (expected == 0)).float().mean() > 0.999
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
    hidden = torch.nn.functional.silu(tokens.x @ ours.gate.T) * (tokens.x @ ours.up.T)
    expected = solved(hidden, dense.down)
    assert ((ours.down == 0) == (expected == 0)).float().mean() > 0.99


@pytest.mark.parametrize("preset", ["fast", "balanced", pytest.param("best", marks=pytest.mark.slow)])
def test_presets(preset: Any) -> None:
    model = build_model("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_model(
            model, random_batches(), PruningConfig(sparsity=0.6, num_calibration_samples=8, preset=preset)
        )
    assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.slow
def test_trained_mixture(trained: Callable[[str], PreTrainedModel], text: TextDataModule) -> None:
    """At 60 % the alternation loses less log-perplexity than SparseGPT, and much less than magnitude pruning."""
    dense, lost = perplexity(trained("mixtral"), text.val_dataloader()), {}
    for method in ("sparsellm", "sparsegpt", "magnitude"):
        model = trained("mixtral")
        config = PruningConfig(sparsity=0.6, num_calibration_samples=128, preset="paper", method=method)  # type: ignore[arg-type]
        prune_model(model, text.train_dataloader(), config)
        lost[method] = math.log(perplexity(model, text.val_dataloader()) / dense)
    # 0.91 on one processor and below 0.9 on others: the model is trained where the test runs, with that processor's rounding.
    assert 0 < lost["sparsellm"] < 0.95 * lost["sparsegpt"]
    assert lost["sparsellm"] < 0.65 * lost["magnitude"]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_mixture_that_gives_router_logits(steps: int) -> None:
    """Its auxiliary loss reads those of every block, and some forwards leave blocks out."""
    model, plain = build_model("mixtral"), build_model("mixtral")
    model.config.output_router_logits = True
    for one in (model, plain):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuning = {"reconstruction_steps": steps, "distillation_steps": steps}
            prune_model(one, random_batches(), PruningConfig(num_calibration_samples=8, **tuning))
    assert model.config.output_router_logits
    assert_same_weights(model, plain)


@pytest.mark.parametrize("name", ["mixtral", "listed_mixtral", "phi3"])
def test_pruned_trained_on_and_exported(name: str, tmp_path: Path) -> None:
    """The zeros of fused parameters hold in training, and plain transformers loads the export."""
    pruner = SparseLLMCallback(
        sparsity=0.6,
        preset="paper",
        num_iterations=2,
        num_calibration_samples=8,
        finetune=True,
        export_dir=tmp_path / "out",
        measure=False,
    )
    model = build_model(name)
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(2))
    before: list[Tensor] = []

    class Note(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            before[:] = before or [p.matrix == 0 for p in describe(model).projections()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(pruner, Note(), max_steps=4).fit(OwnModule(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    assert pruner.report is not None
    assert pruner.report.mask_check is not None
    assert pruner.report.mask_check["checks"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for p, zeros, own in zip(describe(loaded).projections(), before, describe(model).projections(), strict=True):
        assert torch.equal(p.matrix == 0, zeros), p.name
        assert torch.equal(p.matrix, own.matrix)
        assert int(zeros.sum()) == pytest.approx(0.6 * p.size, abs=2)


@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_ranks_without_windows_or_tokens_of_an_expert(method: Any) -> None:
    """Two ranks: the second has no fitted window, or none of the tokens of most experts."""
    config = PruningConfig(preset="paper", method=method, num_iterations=2, sparsity=0.5)
    for windows in (1, 2):
        drawn = torch.randint(0, VOCABULARY, (windows, 1, 3), generator=torch.Generator().manual_seed(0))
        batches = [{"input_ids": ids} for ids in drawn.unbind()]
        models = [build_model("mixtral") for _ in range(3)]

        def prune(ranks: Ranks, model: PreTrainedModel, batches: Any = batches) -> None:
            mine = calibration_batches(batches)[ranks.rank :: ranks.size]
            with torch.no_grad():
                list(prune_blocks(make_context(model, config, ranks), mine, len(mine)))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            on_ranks(2, lambda ranks, models=models, prune=prune: prune(ranks, models[ranks.rank]))  # type: ignore[misc]
            prune(SINGLE, models[2])
        for one, other, alone in zip(*(m.parameters() for m in models), strict=True):
            assert torch.equal(one, other)
            assert float(((one == 0) == (alone == 0)).double().mean()) > 0.97


def test_an_expert_whose_input_is_zero() -> None:
    """It is pruned by magnitude, not by position."""
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for solver in LOCAL_SOLVERS.values():
        inputs = InputStatistics(torch.zeros(16, 16), 0.01)
        pruned = solve_stacked({"w": w}, inputs, {"w": Unstructured(0.5)}, solver)["w"]
        assert torch.equal(pruned, magnitude(w, Unstructured(0.5)))
