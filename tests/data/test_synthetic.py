"""Windows that the model writes, against a loop that runs the whole text for every token, without a cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support.classes import tiny_model
from support.models import VOCABULARY, build_model
from support.sampling import draw
from support.training import trainer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from sparsellm_lightning import (
    CausalLM,
    SparseLLMCallback,
    TextDataModule,
    UserError,
    generate_windows,
)

Trained = Callable[[str], PreTrainedModel]


@torch.no_grad()
def _next_distribution(model: PreTrainedModel, ids: list[int], temperature: float) -> Any:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy() / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _naive(model: PreTrainedModel, index: int, length: int, seed: int, temperature: float = 1.0) -> list[int]:
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{index}").getrandbits(63))
    ids = [model.config.bos_token_id]
    while len(ids) < length:
        ids.append(draw(_next_distribution(model, ids, temperature), generator))
    return ids


@pytest.mark.parametrize(
    "name", ["llama", "opt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma2"))]
)
def test_same_as_without_a_cache(trained: Trained, name: str) -> None:
    """40 tokens are more than the sliding window (16) of every second layer of gemma2."""
    model = trained(name)
    windows = generate_windows(model, 3, 40, seed=5, batch_size=2)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [_naive(model, index, 40, seed=5) for index in range(3)]


@pytest.mark.parametrize("model_type", ["openai-gpt", "rwkv"])
def test_models_without_an_ordinary_cache(model_type: str) -> None:
    """They ignore the one that they are given."""
    more = {"rescale_every": 0} if model_type == "rwkv" else {}
    model = tiny_model(model_type, vocab_size=VOCABULARY, bos_token_id=0, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # otherwise all tokens are about equally likely
    assert generate_windows(model, 2, 12).tolist() == [_naive(model, index, 12, seed=0) for index in range(2)]


def test_temperature(trained: Trained) -> None:
    model = trained("llama")
    assert generate_windows(model, 2, 20, temperature=1.5).tolist() == [_naive(model, i, 20, 0, 1.5) for i in (0, 1)]
    greedy = [model.config.bos_token_id]
    while len(greedy) < 20:
        greedy.append(int(_next_distribution(model, greedy, 1.0).argmax()))
    assert generate_windows(model, 2, 20, temperature=1e-4).tolist() == [greedy, greedy]


def test_a_window_depends_on_seed_and_index_only(trained: Trained) -> None:
    model = trained("llama")
    model.train()
    before = torch.random.get_rng_state()
    windows = generate_windows(model, 9, 24, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert len({tuple(window) for window in windows.tolist()}) == 9
    for batch_size in (1, 4, 9):
        assert torch.equal(generate_windows(model, 9, 24, seed=1, batch_size=batch_size), windows)
    assert torch.equal(generate_windows(model, 4, 24, seed=1), windows[:4])
    assert torch.equal(generate_windows(model, 9, 12, seed=1), windows[:, :12])
    # Neighbouring seeds share no window, not even under another index.
    others = generate_windows(model, 9, 24, seed=2)
    assert not {tuple(window) for window in windows.tolist()} & {tuple(window) for window in others.tolist()}


def test_tokens_follow_the_models_distribution(trained: Trained) -> None:
    model = trained("llama")
    count = 4000
    firsts = generate_windows(model, count, 2, batch_size=1000)[:, 1]
    frequencies = torch.bincount(firsts, minlength=VOCABULARY).numpy() / count
    expected = _next_distribution(model, [model.config.bos_token_id], 1.0)
    # E|f - p| is at most sqrt(p (1 - p) / n) for each token; half their sum is the distance in total variation.
    bound = 0.5 * np.sqrt(expected * (1 - expected) / count).sum()
    assert 0.5 * np.abs(frequencies - expected).sum() < 1.3 * bound


@torch.no_grad()
def test_generated_text_is_likely(trained: Trained) -> None:
    model = trained("llama")

    def loss(windows: Tensor) -> float:
        return float(model(windows, labels=windows).loss)

    random_tokens = torch.randint(VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    assert loss(generate_windows(model, 8, 64)) < loss(random_tokens) - 3


def test_goes_on_after_an_end_of_sequence(trained: Trained) -> None:
    model = trained("llama")
    token = int(generate_windows(model, 1, 24)[0, 10])
    before = generate_windows(model, 4, 24)
    model.config.eos_token_id = model.generation_config.eos_token_id = token
    assert torch.equal(generate_windows(model, 4, 24), before)


def test_first_token() -> None:
    model = build_model("llama")

    def first(**ids: Any) -> int:
        for name in ("bos_token_id", "eos_token_id"):
            setattr(model.config, name, ids.get(name))
            setattr(model.generation_config, name, ids.get(f"generation_{name}"))
        return int(generate_windows(model, 1, 1))

    assert first(bos_token_id=3, generation_bos_token_id=4, eos_token_id=5) == 3
    assert first(generation_bos_token_id=4, eos_token_id=5) == 4
    assert first(eos_token_id=[5, 6], generation_eos_token_id=7) == 5
    assert first(generation_eos_token_id=7) == 7
    with pytest.raises(UserError, match=r"got neither in its configuration. Set model\.config\.bos_token_id"):
        first()


def test_errors() -> None:
    model = build_model("llama")
    for wrong in (
        {"count": 0},
        {"length": 0},
        {"batch_size": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(UserError, match="of at least 1 and a temperature above 0, got"):
            generate_windows(model, **{"count": 1, "length": 4, **wrong})  # type: ignore[arg-type]
    for name, context in (("llama", 128), ("gpt2", 128)):
        assert generate_windows(build_model(name), 1, context).shape == (1, context)
        with pytest.raises(UserError, match=f"context of {context} tokens, got length {context + 1}"):
            generate_windows(build_model(name), 1, context + 1)
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UserError, match="language-model head, which LlamaForSequenceClassification has not"):
        generate_windows(AutoModelForSequenceClassification.from_config(config), 1, 4)


# --- in a Trainer ---


def _data(**kwargs: Any) -> TextDataModule:
    return TextDataModule("self", **{"sequence_length": 32, "batch_size": 4, "seed": 3, **kwargs})


def _pruner(**kwargs: Any) -> SparseLLMCallback:
    options = {"preset": "paper", "sparsity": 0.6, "method": "wanda", "num_calibration_samples": 6, "seed": 3}
    return SparseLLMCallback(**{**options, **kwargs})  # type: ignore[arg-type]


class Seen(pl.Callback):
    """The windows of every training step."""

    def __init__(self) -> None:
        self.windows: list[list[int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.windows += batch["input_ids"].tolist()


def test_pruning_needs_no_text(model_dir: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration uses the dense model's windows. Only the requested windows are generated, once."""
    asked = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(generate_windows(*args, **kwargs))
        return asked[-1]

    monkeypatch.setattr("sparsellm_lightning.data.datamodule.generate_windows", spy)
    pruner, module = _pruner(), CausalLM(str(model_dir))
    trainer(pruner).fit(module, _data())
    assert pruner.report is not None
    assert pruner.report.sparsity["achieved"] == pytest.approx(0.6, abs=0.01)  # wanda: whole numbers in rows of 64
    assert (pruner.report.calibration["windows"], pruner.report.calibration["tokens"]) == (6, 6 * 32)
    assert pruner.report.perplexity == {"dense": None, "pruned": None}
    assert len(asked) == 1
    assert torch.equal(asked[0], generate_windows(trained("llama"), 6, 32, seed=3))


def test_model_attribute_chooses_the_model_that_writes(model_dir: Path, trained: Trained) -> None:
    """The datamodule's own argument decides. The datamodule does not read the pruner's argument of the same name."""

    def run(data: TextDataModule) -> Tensor:
        module = CausalLM(str(model_dir))
        module.teacher = trained("gpt2")
        trainer(_pruner(model_attribute="model")).fit(module, data)
        return torch.cat([batch["input_ids"] for batch in data.calibration_dataloader(6, 3)])

    assert torch.equal(run(_data(model_attribute="teacher")), generate_windows(trained("gpt2"), 6, 32, seed=3))
    with pytest.raises(UserError, match=r"found .*teacher.*model_attribute"):
        run(_data())


def test_perplexity_on_test_files(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The value of an expression is computed when the statement runs. " * 20)
    pruner = _pruner()
    trainer(pruner).fit(CausalLM(str(model_dir)), _data(test_files=str(tmp_path / "text.txt")))
    assert pruner.report is not None
    assert pruner.report.perplexity["pruned"] > pruner.report.perplexity["dense"] > 1


def test_training_on_generated_windows(model_dir: Path, trained: Trained, tmp_path: Path) -> None:
    """Training uses the dense model's windows. So does a resumed run, whose model is pruned."""

    def run(steps: int, ckpt_path: Path | None = None) -> tuple[Seen, CausalLM]:
        seen, module = Seen(), CausalLM(str(model_dir))
        fit = trainer(_pruner(finetune=True), seen, max_steps=steps)
        fit.fit(module, _data(max_train_windows=8), ckpt_path=None if ckpt_path is None else str(ckpt_path))
        fit.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return seen, module

    (straight, straight_module), (first, _) = run(4), run(3)
    second, module = run(4, tmp_path / "3.ckpt")
    dense = generate_windows(trained("llama"), 8, 32, seed=3)
    assert sorted(straight.windows[:8]) == sorted(straight.windows[8:]) == sorted(dense.tolist())
    assert first.windows + second.windows == straight.windows
    for resumed, expected in zip(module.parameters(), straight_module.parameters(), strict=True):
        assert torch.equal(resumed, expected)


def test_a_resumed_run_writes_no_new_windows(model_dir: Path, tmp_path: Path) -> None:
    """Its model is pruned."""
    fit = trainer(_pruner(finetune=True), max_steps=2)
    fit.fit(CausalLM(str(model_dir)), _data(max_train_windows=8))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    resumed = trainer(_pruner(finetune=True), max_steps=4)
    with pytest.raises(UserError, match="the checkpoint does not hold the 16 of 32 tokens"):
        resumed.fit(CausalLM(str(model_dir)), _data(max_train_windows=16), ckpt_path=str(tmp_path / "a.ckpt"))


def test_training_on_no_windows_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="source self needs max_train_windows to train, got none"):
        trainer(max_steps=1).fit(CausalLM(str(model_dir)), _data())
    # A run that prunes first is refused before pruning.
    monkeypatch.setattr(
        "sparsellm_lightning.callbacks.reports.prune_model", lambda *args, **kwargs: pytest.fail("pruned")
    )
    with pytest.raises(UserError, match="source self needs max_train_windows to train, got none"):
        trainer(_pruner(finetune=True), max_steps=1).fit(CausalLM(str(model_dir)), _data())


def test_windows_are_of_the_run_s_model(trained: Trained) -> None:
    """A datamodule in a second run with another model has the windows of that model."""

    class Takes(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            batches = list(trainer.datamodule.calibration_dataloader(2))  # type: ignore[attr-defined]
            self.windows = torch.cat([batch["input_ids"] for batch in batches])
            trainer.should_stop = True

    data = _data()
    for name in ("llama", "opt"):
        module = CausalLM(name)
        module.model = trained(name)
        takes = Takes()
        trainer(takes).fit(module, data)
        assert torch.equal(takes.windows, generate_windows(trained(name), 2, 32, seed=3))


def test_needs_a_trainer() -> None:
    with pytest.raises(UserError, match=r"Pass the datamodule to trainer\.fit, or call generate_windows"):
        _data().calibration_dataloader(2)
    with pytest.raises(UserError, match="num_samples must be at least 1, got 0"):
        _data().calibration_dataloader(0)
