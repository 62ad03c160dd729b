"""Faults in the model, the text and the settings end a run with a message, and never with a wrong result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import VOCABULARY, build_model
from support.runs import assert_same_weights

from sparsellm_lightning import NumericalError, PruningConfig, UserError, perplexity, prune_model
from sparsellm_lightning.solvers import Gram, NofM, Ranks, Unstructured, admm

PRESETS = ["paper", "fast", "balanced"]


def windows(count: int = 8, length: int = 16) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def config(**settings: Any) -> PruningConfig:
    return PruningConfig(sparsity=0.5, num_calibration_samples=8, **settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_token_counts(preset: Any) -> None:
    model = build_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = windows()
    with pytest.raises(UserError, match="at least one calibration window in which a token counts"):
        prune_model(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], config(preset=preset))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_only_the_last_window_counts() -> None:
    """It is fitted, not held out, as if there were no other."""
    ids = windows()
    mask = torch.zeros_like(ids)
    mask[-1] = 1
    found, expected = build_model("llama"), build_model("llama")
    prune_model(found, [{"input_ids": ids, "attention_mask": mask}], config(preset="balanced"))
    prune_model(expected, [ids[-1:]], config(preset="balanced"))
    assert_same_weights(found, expected)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        *((preset, "model.layers.2.mlp.down_proj.weight") for preset in PRESETS),
        ("paper", "model.layers.2.input_layernorm.weight"),
        ("paper", "model.embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_is_not_finite(preset: Any, name: str, value: float) -> None:
    model = build_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NumericalError, match=name):
        prune_model(model, [windows()], config(preset=preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("window", [0, 7], ids=["fitted", "held out"])
def test_an_activation_is_not_finite(preset: Any, window: int) -> None:
    model = build_model("llama")
    embeds = model.get_input_embeddings()(windows()).detach()
    embeds[window, 3] = float("nan")
    with pytest.raises(NumericalError, match="hidden states in front of the first block"):
        prune_model(model, [{"inputs_embeds": embeds}], config(preset=preset))


@pytest.mark.parametrize("damping", [0.0, 1e-8])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NofM(2, 4)])
def test_admm_without_damping_does_not_diverge(damping: float, tokens: int, pattern: Any) -> None:
    """The Gram matrix is singular. Conjugate gradients that go on after convergence gave 1e32 or NaN."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 64, generator=generator), torch.randn(32, 64, generator=generator)
    gram = Gram(64)
    gram.add(x)
    pruned = admm(weight, gram.mean(Ranks()), damping, pattern)
    assert bool(torch.isfinite(pruned).all())
    assert float(pruned.abs().max()) < 100 * float(weight.abs().max())
    magnitude = weight * pattern.select(weight.abs())
    error, reference = ((x @ (weight - w).T).square().sum() for w in (pruned, magnitude))
    assert error <= reference


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.arange(1, 17), r"shape \(batch, sequence\).* got torch.int64 of shape \(16,\)"),
        (windows().float(), "must be integers"),
        (windows() > 3, "must be integers"),
        (windows().to(torch.uint8), "int64 or int32.*got torch.uint8"),
        (torch.zeros(4, 0, dtype=torch.long), "at least one token long"),
        (windows() + VOCABULARY - 1, f"vocabulary, 0 to {VOCABULARY - 1}, got .* tokenizer that belongs"),
        (windows() - 5, "vocabulary"),
        (windows(2, 129), "context of 128 tokens, got windows of 129"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_batches_that_the_model_cannot_take(name: str, batch: torch.Tensor, message: str) -> None:
    model = build_model(name)
    with pytest.raises(UserError, match=message):
        prune_model(model, [batch], config())
    with pytest.raises(UserError, match=message):
        perplexity(model, [{"input_ids": batch}])


def test_a_block_that_is_listed_twice() -> None:
    model = build_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UserError, match="3 blocks of LlamaForCausalLM are only 2 modules"):
        prune_model(model, [windows()], config())


def test_a_loader_that_raises() -> None:
    """Its error comes through, the model is as before, and so is the random state."""
    model = build_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()

    def loader() -> Any:
        yield windows(4)
        torch.rand(3)
        raise ConnectionError("the text is gone")

    with pytest.raises(ConnectionError, match="the text is gone"):
        prune_model(model.train(), loader(), config())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training


def test_autocast_around_pruning_is_refused() -> None:
    """It keeps copies of the weights in bfloat16, which do not change when these are pruned."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"not be called inside torch\.autocast"):
        prune_model(build_model("llama"), [windows()], config(preset="paper"))


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_is_refused(made_inside: bool) -> None:
    """It never gives gradients, nor do weights that were made inside it."""
    with torch.inference_mode():
        model = build_model("llama")
        if not made_inside:
            with torch.inference_mode(False):
                model = build_model("llama")
            with pytest.raises(UserError, match=r"torch\.inference_mode never gives"):
                prune_model(model, [windows()], config())
    if made_inside:
        with pytest.raises(UserError, match=r"torch\.inference_mode never gives"):
            prune_model(model, [windows()], config())
