"""Distillation at the end of pruning, against plain Adam on the whole model, and what it must not change."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import calibration_batches, make_context, zero_smaller_half
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel

from sparsellm_lightning import PruningConfig, TextDataModule, UserError, perplexity, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.distributed import ranks_on_this_host
from sparsellm_lightning.models import evaluation, vocabulary
from sparsellm_lightning.pipeline import distil
from sparsellm_lightning.pipeline.distil import Distiller
from sparsellm_lightning.pipeline.kept import activations_of_tuning
from sparsellm_lightning.solvers import Ranks

ONE: dict[str, Any] = {
    "preset": "paper",
    "method": "magnitude",
    "num_calibration_samples": 8,
    "calibration_val_fraction": 0.0,
}


def divergences(model: PreTrainedModel, dense: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """KL of each token that counts, from whole logits."""
    with torch.no_grad():
        p = dense(**batch, use_cache=False).logits.log_softmax(-1)
    q = model(**batch, use_cache=False).logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()]


def adam_by_hand(model: PreTrainedModel, dense: PreTrainedModel, steps: int, rate: float) -> None:
    """Adam on all tokens, everything but the blocks frozen. Pruned weights are set to zero after every step."""
    layout = describe(model)
    pruned = {id(p.parameter) for p in layout.projections()}
    parameters = [parameter for block in layout.blocks for parameter in block.module.parameters()]
    masks = [parameter != 0 if id(parameter) in pruned else torch.ones_like(parameter) for parameter in parameters]
    groups = []
    for parameter, mask in zip(parameters, masks, strict=True):
        share = float(mask.float().mean())
        size = float(parameter.detach().square().sum() / mask.sum()) ** 0.5
        groups.append({"params": [parameter], "lr": rate * max(size, 1e-3) / share})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(0.1 * steps, 1), 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        torch.cat([divergences(model, dense, batch) for batch in random_batches()]).mean().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for parameter, mask in zip(parameters, masks, strict=True):
                parameter.mul_(mask)


@pytest.mark.parametrize(
    ("name", "positions", "likely"),
    [
        *((name, 7, None) for name in ("llama", "gpt2", "opt", "gemma2", "mixtral")),
        *(
            (name, 1000, likely) for name in ("llama", "gemma2") for likely in (None, VOCABULARY)
        ),  # gemma2 caps its logits
    ],
)
def test_steps_are_those_of_plain_adam(
    name: str, positions: int, likely: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All windows in one step; logits of a few positions at a time or of all; a sample that has the whole vocabulary."""
    monkeypatch.setattr(distil, "STEP_TOKENS", 10_000)
    if likely:
        monkeypatch.setattr(vocabulary, "LIKELY", likely)
        monkeypatch.setattr(vocabulary, "OTHERS", 1)
    monkeypatch.setattr(evaluation, "LOGITS", positions * 3 * VOCABULARY)
    dense, model = build_model(name), build_model(name)
    context = make_context(model, PruningConfig(**ONE, distillation_steps=5, solver_precision="float32"))
    distiller = Distiller(context, calibration_batches(random_batches()), 8)
    zero_smaller_half(describe(model).projections())
    plain = copy.deepcopy(model)
    assert bool(distiller.likely) == bool(likely)
    found = distiller.tune()
    adam_by_hand(plain, dense, 5, distil.LEARNING_RATE)
    for (key, tensor), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-5, msg=key)
    assert found["steps"] == 5
    with torch.no_grad():
        after = float(torch.cat([divergences(model, dense, batch) for batch in random_batches()]).mean())
    assert found["divergence"][1] == pytest.approx(after, rel=1e-3)
    assert after < found["divergence"][0]


@pytest.mark.parametrize("later", [2.5, float("nan")])
def test_the_best_state_on_held_out_windows_is_kept(later: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    context = make_context(model, PruningConfig(**ONE, distillation_steps=8, solver_precision="float32"))
    distiller = Distiller(context, calibration_batches(random_batches()), 5)
    zero_smaller_half(describe(model).projections())
    states: list[dict[str, Tensor]] = []
    falling = iter([3.0, 1.0, later])

    def divergence(self: Distiller) -> float:
        states.append(copy.deepcopy(model.state_dict()))
        return next(falling)

    monkeypatch.setattr(Distiller, "divergence", divergence)
    assert distiller.tune() == {"steps": 4, "divergence": [3.0, 1.0]}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[1][name])
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in model.state_dict().items())


def test_the_dense_model_runs_on_the_windows_of_the_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "STEP_TOKENS", 32)
    context = make_context(build_model("llama"), PruningConfig(**ONE, distillation_steps=2))
    distiller = Distiller(context, calibration_batches(random_batches()), 5)
    assert len(distiller.fitted) == 2
    assert len(distiller.held_out) == 3
    assert {index for chosen in distiller.schedule for index in chosen} == set(distiller.fitted)


def test_calibration_windows_come_after_written_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calibration windows, three written ones, three held out."""
    monkeypatch.setattr(distil, "STEP_TOKENS", 32)
    context = make_context(build_model("llama"), PruningConfig(**ONE, distillation_steps=10))
    whole = calibration_batches([{"input_ids": row[None]} for batch in random_batches() for row in batch["input_ids"]])
    distiller = Distiller(context, whole[:2] + whole[5:], 2, whole[2:5])
    order = [index for (index,) in distiller.schedule]
    assert sorted(order[:3]) == [2, 3, 4]
    assert order[3] in (2, 3, 4)
    assert sorted(order[4:6]) == sorted(order[6:8]) == sorted(order[8:]) == [0, 1]
    for index in range(5):
        assert torch.equal(distiller.fitted[index][0].inputs["input_ids"], whole[index].inputs["input_ids"])


def test_ranks_change_from_written_windows_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank has two windows of its own and two written ones, the other a window of its own only."""
    monkeypatch.setattr(distil, "STEP_TOKENS", 64)
    models = [build_model("llama") for _ in range(2)]
    windows = [row[None] for batch in random_batches() for row in batch["input_ids"]]

    def on_rank(ranks: Ranks) -> list[list[int]]:
        context = make_context(models[ranks.rank], PruningConfig(**ONE, distillation_steps=5), ranks=ranks)
        own, written = ((2, 2), (1, 0))[ranks.rank]
        batches = calibration_batches([{"input_ids": ids} for ids in windows[: own + written]])
        return Distiller(context, batches[:own], own, batches[own:]).schedule

    first, second = on_ranks(2, on_rank)
    assert all(set(chosen) <= {2, 3} for chosen in first[:2])
    assert second[:2] == [[], []]
    assert all(set(chosen) <= {0, 1} for chosen in first[2:])
    assert second[2:] == [[0]] * 3


def test_held_out_windows_are_not_fitted() -> None:
    """Other tokens in the held-out windows choose another state at most; here one state is checked."""
    results = []
    for seed in (0, 1):
        batches = random_batches()
        held_out = torch.Generator().manual_seed(seed)
        for row in (2,):
            batches[1]["input_ids"][row] = torch.randint(0, VOCABULARY, (32,), generator=held_out)
        batches[2]["input_ids"][:] = torch.randint(0, VOCABULARY, (2, 32), generator=held_out)
        model = build_model("llama")
        context = make_context(model, PruningConfig(**ONE, distillation_steps=1, solver_precision="float32"))
        distiller = Distiller(context, calibration_batches(batches), 5)
        zero_smaller_half(describe(model).projections())
        assert distiller.tune()["steps"] == 1, "the state is not the one before"
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_ranks_take_the_same_steps() -> None:
    """Three ranks with a batch each, and one without windows."""
    batches = random_batches()
    models = [build_model("llama") for _ in range(4)]

    def on_rank(ranks: Ranks) -> tuple[list[float], dict[str, Tensor]]:
        model = models[ranks.rank]
        context = make_context(
            model, PruningConfig(**ONE, distillation_steps=3, solver_precision="float32"), ranks=ranks
        )
        mine = batches[ranks.rank : ranks.rank + 1]
        distiller = Distiller(context, calibration_batches(mine), 8)
        zero_smaller_half(describe(model).projections())
        return distiller.tune()["divergence"], model.state_dict()

    shared = on_ranks(4, on_rank)
    model = build_model("llama")
    context = make_context(model, PruningConfig(**ONE, distillation_steps=3, solver_precision="float32"))
    distiller = Distiller(context, calibration_batches(batches), 8)
    zero_smaller_half(describe(model).projections())
    alone = distiller.tune()["divergence"]
    for divergence, state in shared:
        assert divergence == pytest.approx(alone, rel=1e-3)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "neurons", "blocks"])
def test_zeros_stay(pattern: str) -> None:
    """Also the biases of blocks that left."""
    zeros = []
    for steps in (0, 4):
        model = build_model("opt")
        settings = {**ONE, "method": "sparsegpt", "pattern": pattern, "round_to": 16}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = prune_model(model, random_batches(), PruningConfig(**settings, distillation_steps=steps))
        zeros.append({p.name: p.matrix == 0 for p in describe(model).projections()})
        if pattern == "blocks":
            gone = [b for b in describe(model).blocks if not any(bool(p.matrix.any()) for p in b.projections())]
            assert gone
            assert not any(bool(p.bias.any()) for b in gone for p in b.projections() if p.bias is not None)
    assert all(torch.equal(mask, zeros[1][name]) for name, mask in zeros[0].items())
    assert report.distillation is not None
    assert report.phases["distillation"] > 0
    assert report.work["distillation"]


def test_only_the_blocks_change() -> None:
    model, before = build_model("llama"), build_model("llama").state_dict()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    prune_model(model, random_batches(), PruningConfig(**ONE, distillation_steps=2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("layers" not in name), name
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())  # type: ignore[arg-type]


def test_one_gradient_is_held_at_a_time() -> None:
    model = build_model("llama")
    parameters = [p for block in describe(model).blocks for p in block.module.parameters()]
    held: list[int] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in parameters)))
    prune_model(model, random_batches(), PruningConfig(**ONE, distillation_steps=2))
    assert len(held) >= 2 * len(parameters)
    assert max(held) == 1


def test_trained_model(
    trained: Callable[[str], PreTrainedModel], text: TextDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 70 %, a quarter of the loss at least is made up for, on text that was not seen. Also with a sampled vocabulary."""
    monkeypatch.setattr(vocabulary, "LIKELY", 4)
    dense, lost = perplexity(trained("llama"), text.val_dataloader()), {}
    for steps, others in ((0, 64), (96, 64), (96, vocabulary.OTHERS)):
        monkeypatch.setattr(vocabulary, "OTHERS", others)
        model = trained("llama")
        config = PruningConfig(
            sparsity=0.7, preset="paper", method="sparsegpt", num_calibration_samples=128, distillation_steps=steps
        )
        prune_model(model, text.train_dataloader(), config)
        lost[steps, others] = math.log(perplexity(model, text.val_dataloader()) / dense)
    assert all(0 < lost[96, others] < 0.75 * lost[0, 64] for others in (64, vocabulary.OTHERS))


def test_parameters_that_are_not_contiguous() -> None:
    results = []
    for transposed in (False, True):
        model = build_model("llama")
        if transposed:
            for projection in (p for block in describe(model).blocks for p in block.projections()):
                projection.parameter.data = projection.parameter.data.T.contiguous().T
        context = make_context(model, PruningConfig(**ONE, distillation_steps=2, solver_precision="float32"))
        distiller = Distiller(context, calibration_batches(random_batches()), 8)
        zero_smaller_half(describe(model).projections())
        distiller.tune()
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_model_without_a_head_is_refused() -> None:
    torch.manual_seed(0)
    model = LlamaModel(build_model("llama").config)
    with pytest.raises(UserError, match="distillation_steps compare next-token distributions, but LlamaModel has no"):
        prune_model(model, random_batches(), PruningConfig(**ONE, distillation_steps=2))


@pytest.mark.parametrize(
    ("preset", "dropped"),
    [("balanced", "allocation, distillation_steps"), ("best", "allocation, continuations, distillation_steps")],
)
def test_a_preset_goes_without_what_the_model_cannot_do(preset: Any, dropped: str) -> None:
    torch.manual_seed(0)
    model = LlamaModel(build_model("llama").config)
    settings = {"num_calibration_samples": 8, "reconstruction_steps": 2}
    with pytest.warns(
        UserWarning, match=f"Preset {preset} goes without its {dropped}: LlamaModel has no language-model"
    ):
        report = prune_model(model, random_batches(), PruningConfig(preset=preset, **settings))
    assert report.distillation is None
    assert report.sparsity["achieved"] == pytest.approx(0.5, abs=1e-3)


def test_a_preset_goes_without_what_the_memory_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "room", lambda *_: 1000.0)
    config = PruningConfig(num_calibration_samples=8, reconstruction_steps=2)
    with pytest.warns(UserWarning, match="Preset balanced goes without distillation: distillation_steps need"):
        report = prune_model(build_model("llama"), random_batches(), config)
    assert report.distillation is None


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_ranks(3, ranks_on_this_host) == [3, 3, 3]
    monkeypatch.setattr(distil, "room", lambda *_: 8e6)  # of which one rank needs about 3
    config = PruningConfig(num_calibration_samples=8, reconstruction_steps=2, distillation_steps=2)
    report = prune_model(build_model("llama"), random_batches(), config)
    assert report.distillation is not None
    monkeypatch.setattr(distil, "ranks_on_this_host", lambda ranks: 4)
    with pytest.raises(UserError, match=r"and there are 1\.907 MiB"):
        prune_model(build_model("llama"), random_batches(), config)


def test_no_room_for_gradients_is_refused_before_long_work() -> None:
    model = build_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError,
        match=r"distillation_steps need .*iB besides the model, for gradients, activations and Adam's moments, .* are 1000 B",
    ):
        prune_model(model, random_batches(), PruningConfig(**ONE, distillation_steps=2, memory=1000))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_windows_of_embeddings() -> None:
    """As the tokens whose embeddings they are."""
    results = []
    for embedded in (False, True):
        model = build_model("llama")
        ids = torch.randint(1, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
        batch = {"inputs_embeds": model.get_input_embeddings()(ids).detach()} if embedded else {"input_ids": ids}
        config = PruningConfig(num_calibration_samples=8, reconstruction_steps=2, distillation_steps=2)
        prune_model(model, [batch], config)
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_few_written_windows_take_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only windows of the greatest length are continued: here one of eight, which would take two fifths of the steps."""
    monkeypatch.setattr(distil, "STEP_TOKENS", 32)
    made: list[Distiller] = []
    monkeypatch.setattr(Distiller, "tune", lambda self: made.append(self))
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, VOCABULARY, (1, length), generator=generator) for length in range(32, 24, -1)]
    settings: dict[str, Any] = {**ONE, "continuations": 2, "distillation_steps": 60}
    with pytest.warns(UserWarning, match="continuations asks for 16 written windows, but there are 2"):
        prune_model(build_model("llama"), windows, PruningConfig(**settings, sparsity=0.5))
    (distiller,) = made
    assert sum(min(chosen) >= 8 for chosen in distiller.schedule) == round(0.4 * 60 * 2 / 16)


@pytest.mark.parametrize(("name", "cast"), [("llama", None), ("opt", None), ("gpt2", None), ("llama", torch.bfloat16)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_memory_of_the_activations_of_a_step(name: str, cast: torch.dtype | None, attention: str) -> None:
    """About what autograd keeps. GPT-2 computes its activation function in parts, which are kept too."""
    model = build_model(name)
    model.set_attn_implementation(attention)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones(2, 64, dtype=torch.long)
    autocast = torch.autocast("cpu", cast, enabled=cast is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        outputs = model.base_model(ids, use_cache=False)  # held, so that no storage is used twice
    estimated = activations_of_tuning(describe(model), *ids.shape, cast)
    assert outputs is not None
    assert (0.65 if name == "gpt2" else 0.8) < estimated / sum(kept.values()) < 1.7
