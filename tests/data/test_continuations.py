"""Windows that the model writes: against a loop without a cache, and what a run does with them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.classes import tiny_model
from support.models import VOCABULARY, build_model
from support.ranks import on_ranks
from support.runs import make_context, tune_with
from support.sampling import draw
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.data import CalibrationBatch, rewrite_windows, written_windows
from sparsellm_lightning.data.synthetic import _bytes_of_a_token
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.pipeline import distil
from sparsellm_lightning.pipeline.distil import Distiller
from sparsellm_lightning.pipeline.prune import _for_blocks
from sparsellm_lightning.solvers import SINGLE, Ranks

CPU = torch.device("cpu")


def random_ids(windows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(name).getrandbits(63))


@torch.no_grad()
def naive(
    model: PreTrainedModel, window: list[int], cuts: list[tuple[int, int]], name: str, from_random_tokens: bool
) -> list[int]:
    """Each part of a window is a prompt, or a drawn token. For every token, the whole text so far goes through the model."""
    written: list[int] = []
    drawn = torch.randint(VOCABULARY, (len(cuts),), generator=generator_of(name)).tolist()
    for number, (start, end) in enumerate(cuts):
        generator = generator_of(f"{name}/{number}")
        ids = [drawn[number]] if from_random_tokens else window[start:end]
        for _ in range(end - start - from_random_tokens):
            chances = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)
            ids = [*ids, draw(chances.numpy(), generator)]
        written += ids[start - end :]
    return written[: len(window)]


@pytest.mark.parametrize(
    ("length", "prompt", "cuts"),
    [
        (48, 16, [(0, 16), (16, 32), (32, 48)]),
        (41, 16, [(0, 14), (14, 28), (27, 41)]),  # three parts of 14. The last two overlap
        (9, 128, [(0, 9)]),
        (100, 128, [(0, 50), (50, 100)]),  # a window and its continuation would not fit into the context of 128
    ],
)
@pytest.mark.parametrize("name", ["mistral", "gpt2"])
@pytest.mark.parametrize("random_tokens", [False, True])
def test_written_tokens(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    length: int,
    prompt: int,
    cuts: list[tuple[int, int]],
    random_tokens: bool,
) -> None:
    """The tokens of the loop without a cache, in one and in several batches. Mistral has a sliding window of 16 tokens."""
    model = build_model(name)
    windows, names = random_ids(2, length), ["a", "b"]
    monkeypatch.setattr("sparsellm_lightning.data.synthetic.PROMPT", prompt)
    expected = [
        naive(model, window, cuts, name, random_tokens) for window, name in zip(windows.tolist(), names, strict=True)
    ]
    a_token = 2 * 3 * 64 * 4  # keys and values of three layers, at most as wide as the model, in float32
    for tokens, held in [(10_000, 2**30), (20, 2**30), (10_000, 20 * a_token)]:
        monkeypatch.setattr("sparsellm_lightning.data.synthetic.HELD_TOKENS", tokens)
        monkeypatch.setattr("sparsellm_lightning.data.synthetic.HELD_BYTES", held)
        found = rewrite_windows(model, windows, names, StrategyAdapter(), from_random_tokens=random_tokens)
        assert found.tolist() == expected


@pytest.mark.parametrize(("held", "at_once"), [(5 * 32, 5), (3 * 32 - 1, 2), (1, 1), (1000 * 32, 6)])
def test_prompts_at_once(monkeypatch: pytest.MonkeyPatch, held: int, at_once: int) -> None:
    """Each of six prompts needs room for 2 x 16 tokens: its own and its continuation's. There is room for ``held`` tokens."""
    model = build_model("llama")
    a_token = sum(
        2 * layer.self_attn.k_proj.out_features * layer.self_attn.k_proj.weight.itemsize for layer in model.model.layers
    )
    monkeypatch.setattr("sparsellm_lightning.data.synthetic.PROMPT", 16)
    monkeypatch.setattr("sparsellm_lightning.data.synthetic.HELD_BYTES", held * a_token)
    batches: list[int] = []

    def sample(model: PreTrainedModel, prompts: Tensor, *args: Any) -> Tensor:
        batches.append(len(prompts))
        return prompts

    monkeypatch.setattr("sparsellm_lightning.data.synthetic._sample", sample)
    rewrite_windows(model, random_ids(2, 48), ["a", "b"], StrategyAdapter())
    assert sum(batches) == 6
    assert max(batches) == at_once


def echo(windows: Tensor, names: list[str], copy: int) -> Tensor:
    """In place of the model: the second and third token are replaced by the number of the window and that of the copy."""
    numbers = torch.tensor([[int(part) for part in name.split("/")] for name in names])
    assert numbers[:, 1].tolist() == [copy] * len(names)
    return torch.cat([windows[:, :1], numbers, windows[:, 3:]], 1)


def rows_of(batches: list[CalibrationBatch]) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.inputs["input_ids"]]


def test_windows_are_written_after_each_window() -> None:
    ids = random_ids(5, 8)
    positions = torch.arange(8)[None]
    batches = [CalibrationBatch({"input_ids": part, "position_ids": positions}, None) for part in ids.split(3)]
    found, number = written_windows(batches, 2, echo, SINGLE, CPU)
    assert rows_of(found) == [[ids[i, 0].item(), i, copy, *ids[i, 3:].tolist()] for copy in range(2) for i in range(5)]
    assert number == 10
    assert all(batch.inputs.keys() == {"input_ids"} and batch.valid is None for batch in found)


def test_windows_with_padding_or_shorter_are_left_out() -> None:
    ids, short = random_ids(4, 8), random_ids(2, 6, seed=1)
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[1, :3] = False
    batches = [CalibrationBatch({"input_ids": ids}, valid), CalibrationBatch({"input_ids": short}, None)]
    found, number = written_windows(batches, 1, echo, SINGLE, CPU)
    assert number == 3
    assert [row[0] for row in rows_of(found)] == ids[[0, 2, 3], 0].tolist()
    nothing = [CalibrationBatch({"input_ids": ids}, torch.zeros_like(valid))]
    assert written_windows(nothing, 1, echo, SINGLE, CPU) == ([], 0)


@pytest.mark.parametrize("windows", [7, 1])
def test_ranks_write_what_one_process_does(windows: int) -> None:
    """If there is one window, the second rank has none, but makes as many forwards."""
    ids = random_ids(windows, 8)

    def write(ranks: Ranks) -> tuple[list[list[int]], list[int], int]:
        calls = []

        def counted(rows: Tensor, names: list[str], copy: int) -> Tensor:
            calls.append(len(rows))
            return echo(rows, names, copy)

        mine = ids[ranks.rank :: ranks.size]
        batches = [CalibrationBatch({"input_ids": mine}, None)] if len(mine) else []
        found, number = written_windows(batches, 2, counted, ranks, CPU)
        assert len(rows_of(found)) == 2 * len(mine)
        return rows_of(found), calls, number

    one, two = write(SINGLE), on_ranks(2, write)
    assert sorted(two[0][0] + two[1][0]) == sorted(one[0])
    assert two[0][1] == two[1][1] == [-(-windows // 2)] * 2, "equally many forwards on every rank"
    assert [result[2] for result in two] == [one[2]] * 2 == [2 * windows] * 2


def test_windows_for_blocks_do_not_depend_on_the_number_of_ranks() -> None:
    ids, model = random_ids(12, 8), build_model("llama")  # six calibration windows, and one written for each

    def chosen(ranks: Ranks) -> list[list[int]]:
        context = make_context(model, PruningConfig(preset="paper", continuations=1), ranks)
        own, written = (
            [CalibrationBatch({"input_ids": row[None]}, None) for row in part[ranks.rank :: ranks.size]]
            for part in ids.split(6)
        )
        windows, fitted = _for_blocks(context, own, len(own), written)
        assert fitted == len(rows_of(windows))
        return rows_of(windows)

    expected = sorted(ids[:9].tolist())
    assert sorted(chosen(SINGLE)) == expected
    assert sorted(row for rank in on_ranks(2, chosen) for row in rank) == expected


def test_what_is_fitted_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks: half of those from random tokens, as if they were calibration windows. The distillation: all of them."""
    tune_with(monkeypatch, batch_tokens=32)
    monkeypatch.setattr(distil, "STEP_TOKENS", 32)
    windows, made = random_ids(8, 32), []
    options: dict[str, Any] = {
        "preset": "paper",
        "sparsity": 0.6,
        "method": "sparsegpt",
        "target": "model",
        "reconstruction_steps": 12,
        "seed": 4,
        "solver_precision": "float32",
    }
    ours, theirs = build_model("llama"), build_model("llama")
    continued, from_random = (
        rewrite_windows(
            theirs,
            windows[:6],
            [f"4/{window}/{copy}" for window in range(6)],
            StrategyAdapter(),
            from_random_tokens=copy == 1,
        )
        for copy in range(2)
    )
    monkeypatch.setattr(Distiller, "tune", lambda self: made.append(self))
    config = PruningConfig(
        **options, calibration_val_fraction=0.25, num_calibration_samples=8, distillation_steps=60, continuations=2
    )
    report = prune_model(ours, windows.split(2), config)
    both = torch.cat([windows[:6], from_random[:3], windows[6:]])
    prune_model(
        theirs, both.split(2), PruningConfig(**options, calibration_val_fraction=2 / 11, num_calibration_samples=11)
    )
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, msg=name)
    assert report.calibration == {"windows": 8, "held_out": 2, "written": 12, "tokens": 8 * 32}
    assert report.phases["generation"] > 0
    (distiller,) = made
    seen = [distiller.fitted[index][0] for index in sorted(distiller.fitted)]
    assert rows_of(seen) == torch.cat([windows[:6], continued, from_random]).tolist()
    assert rows_of([batch for batch, _ in distiller.held_out]) == windows[6:].tolist()


def test_models_and_batches_without_tokens_are_refused() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    headless = AutoModelForSequenceClassification.from_config(config)
    options: dict[str, Any] = {"preset": "paper", "sparsity": 0.5, "method": "wanda", "num_calibration_samples": 1}
    settings = PruningConfig(**options, continuations=1)
    with pytest.raises(UserError, match=r"language-model head, which LlamaForSequenceClassification .*continuations 0"):
        prune_model(headless, [torch.ones(1, 4, dtype=torch.long)], settings)
    model = build_model("llama")
    embedded = {"inputs_embeds": torch.zeros(1, 4, model.config.hidden_size)}
    with pytest.raises(UserError, match=r"hold inputs_embeds\. Set continuations to 0"):
        prune_model(model, [embedded], settings)


def test_bytes_of_layers_that_differ() -> None:
    """Gemma 4 has wider heads in layers with global attention, and no single width in its configuration."""
    one = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = tiny_model("gemma4_text", **one, global_head_dim=32, layer_types=["sliding_attention", "full_attention"])
    assert _bytes_of_a_token(model) == 2 * 2 * (16 + 32) * 4
