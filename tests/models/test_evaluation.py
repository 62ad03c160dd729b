"""Perplexity from logits of a few positions at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.classes import tiny_model
from support.models import CONFIGS, SIZES, VOCABULARY, build_model
from support.training import trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    GraniteConfig,
    PreTrainedModel,
    ProphetNetConfig,
    XGLMConfig,
    XLNetConfig,
)

from sparsellm_lightning import CausalLM, UserError, perplexity
from sparsellm_lightning.architecture import context_of
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.models import evaluation, model_inputs
from sparsellm_lightning.solvers import Ranks

MORE = {
    # Logits behind the head are scaled, capped or divided.
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere2": Cohere2Config(**SIZES, logit_scale=0.25),
    "xglm": XGLMConfig(vocab_size=VOCABULARY, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4),
    # Its logits do not come from the decoder's last hidden state.
    "prophetnet": ProphetNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        decoder_ffn_dim=128,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        is_decoder=True,
        add_cross_attention=False,
    ),
    "xlnet": XLNetConfig(vocab_size=VOCABULARY, d_model=64, d_inner=128, n_layer=2, n_head=4),
}


def made(name: str) -> PreTrainedModel:
    if name in CONFIGS:
        return build_model(name)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MORE[name]).eval()
    return model


@pytest.mark.parametrize(("model_type", "limit"), [("whisper", "max_target_positions"), ("mpt", "max_seq_len")])
def test_a_context_by_another_name(model_type: str, limit: str) -> None:
    model = tiny_model(model_type)
    assert context_of(model) == getattr(model.config.get_text_config(), limit)


def test_positions_behind_the_padding_index() -> None:
    model = tiny_model("roberta")
    longest = int(context_of(model))
    assert longest == model.config.max_position_embeddings - model.config.pad_token_id - 1
    ids = torch.full((1, longest), 5)
    assert torch.isfinite(model(input_ids=ids).logits).all()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_labels_beside_token_ids_are_not_ignored() -> None:
    ids = torch.arange(12).view(2, 6)
    with pytest.raises(UserError, match="like labels with -100"):
        model_inputs([ids, ids.masked_fill(ids % 6 < 3, -100)])
    assert model_inputs([ids, ids])["input_ids"] is ids


@pytest.mark.parametrize("shortest", [0, 2])
def test_a_mask_beside_token_ids_is_not_ignored(shortest: int) -> None:
    """Also if a window, such as an empty line, is padding alone."""
    ids, lengths = torch.ones(2, 4, dtype=torch.long), torch.tensor([[3], [shortest]])
    with pytest.raises(UserError, match="like an attention mask"):
        model_inputs([ids, (torch.arange(4) < lengths).long()])


@torch.no_grad()
def plain(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> float:
    losses = []
    for batch in batches:
        log_probabilities = model(**batch, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
        chosen = log_probabilities.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        mask = batch["attention_mask"] != 0
        losses.append(-chosen[mask[:, 1:] & mask[:, :-1]])
    return math.exp(float(torch.cat(losses).mean()))


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
@pytest.mark.parametrize("positions", [1, 5, 1000])
def test_slices_give_the_perplexity_of_all_logits(name: str, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(name), random_batches()
    largest = max(len(batch["input_ids"]) for batch in batches)
    monkeypatch.setattr(evaluation, "LOGITS", positions * largest * VOCABULARY)
    seen: list[int] = []
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    found = perplexity(model, batches)
    if name != "prophetnet":
        assert max(seen) <= positions * largest * VOCABULARY
        assert (len(seen) > 2 * len(batches)) == (positions < 1000)
    assert found == pytest.approx(plain(model, batches), rel=1e-4)


@pytest.mark.parametrize(
    ("room", "length", "sizes"),
    [(14, 10, [5, 5]), (14, 7, [7]), (14, 15, [5, 5, 5]), (1, 3, [1, 1, 1]), (6, 8, [3, 3, 2])],
)
def test_slices_of_positions(room: int, length: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as fit, of two windows, and about equally long."""
    monkeypatch.setattr(evaluation, "LOGITS", room * VOCABULARY)
    pieces = evaluation.positions_together(build_model("llama"), 2, length)
    assert [len(range(length)[piece]) for piece in pieces] == sizes


def test_arguments_that_a_batch_shares_are_not_split() -> None:
    """Position ids of one row, on a rank that has a part of the windows."""
    model = build_model("llama")
    ids = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3, 19)[None]
    batch = {"input_ids": ids, "position_ids": positions}
    adapters = [StrategyAdapter() for _ in range(2)]
    for rank, adapter in enumerate(adapters):
        adapter.ranks = Ranks()
        adapter.ranks.rank, adapter.ranks.size = rank, 2
    found = [perplexity(model, [batch], adapter) for adapter in adapters]
    expected = [perplexity(model, [{"input_ids": ids[r::2], "position_ids": positions}]) for r in range(2)]
    assert found == pytest.approx(expected)


def test_a_token_of_tiny_probability() -> None:
    """Whose probability is 0 in float32."""
    logits = torch.zeros(1, 100, 8)
    logits[0, 0, 0] = 200.0
    metric = evaluation.new_metric()
    metric.update(logits, torch.ones(1, 100, dtype=torch.long))
    assert float(metric.compute()) == pytest.approx(math.exp((200 + 99 * math.log(8)) / 100), rel=1e-4)


def test_a_batch_without_targets_has_no_gradient(tmp_path: Path) -> None:
    """Such as questions that are cut before their answers. NaN would become weights."""
    build_model("llama").save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path))
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    ids = torch.ones(1, 8, dtype=torch.long)
    module.training_step({"input_ids": ids, "labels": torch.full_like(ids, -100)}, 0).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_a_test_that_failed_does_not_count_in_the_next(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    good, other = torch.randint(0, VOCABULARY, (2, 1, 16), generator=torch.Generator().manual_seed(0))

    def tested(module: CausalLM, *batches: torch.Tensor) -> Any:
        return trainer().test(module, DataLoader(list(batches), batch_size=None))

    module = CausalLM(str(tmp_path))
    with pytest.raises(UserError, match="vocabulary"):
        tested(module, good, torch.full_like(good, VOCABULARY))
    assert tested(module, other) == tested(CausalLM(str(tmp_path)), other)


def test_causal_lm_gives_the_model_what_calibration_gives_it(tmp_path: Path) -> None:
    """Position ids, on which the attention between packed documents depends; plain tensors; and labels that are None."""
    build_model("llama").save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path))
    module.configure_model()
    module.eval()
    ids = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    packed = {"input_ids": ids, "position_ids": torch.arange(20)[None] % 7}
    with torch.no_grad():
        assert torch.equal(module(packed), module.model(**packed, use_cache=False).logits)
        assert not torch.equal(module(packed), module(ids))
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        for batch, same in ((packed, packed), (ids, {"input_ids": ids}), ({**packed, "labels": None}, packed)):
            expected = module.model(**same, labels=ids, use_cache=False).loss
            assert torch.allclose(module.training_step(batch, 0), expected)
            module.perplexity.reset()
            module.validation_step(batch, 0)
            assert float(module.perplexity.compute()) == pytest.approx(float(expected.exp()), rel=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = build_model("llama"), torch.randint(0, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (9, 0))
    padded = {"input_ids": torch.nn.functional.pad(ids, (9, 0)), "attention_mask": mask}
    padded["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    assert perplexity(model, [padded]) == pytest.approx(perplexity(model, [{"input_ids": ids}]), rel=1e-4)


def test_inputs_that_are_left_out(recwarn: pytest.WarningsRecorder) -> None:
    """Images are named. Labels and masks of other kinds say nothing about the text."""
    ids = torch.ones(1, 4, dtype=torch.long)
    others = {"labels": ids, "loss_mask": ids, "attention_mask": torch.ones(1, 1, 4, 4)}
    assert set(model_inputs({"input_ids": ids, **others})) == {"input_ids", "attention_mask"}
    assert not recwarn.list
    with pytest.warns(UserWarning, match="without pixel_values"):
        assert set(model_inputs({"input_ids": ids, "pixel_values": torch.ones(1, 3, 8, 8)})) == {"input_ids"}
