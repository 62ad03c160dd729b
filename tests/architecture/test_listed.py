"""Mixtures of experts that are lists of modules, against the same mixture in transformers' form."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.batches import random_batches
from support.mixtures import with_listed_experts
from support.models import build_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, prune_model
from sparsellm_lightning.architecture import Experts, Network, describe, routing_in
from sparsellm_lightning.architecture.examination import ROUTES


def experts_of(model: PreTrainedModel) -> Experts:
    (found,) = (unit for unit in describe(model).blocks[0].units if isinstance(unit, Experts))
    return found


FORMS = [("gathered", False), ("gathered", True), ("all", False), ("pair", False)]


@pytest.mark.parametrize(("style", "fused"), FORMS)
def test_pruned_as_the_same_experts_in_three_dimensions(style: str, fused: bool) -> None:
    pruned: list[list[Tensor]] = []
    mixtral = build_model("mixtral")
    for model in (mixtral, with_listed_experts(build_model("mixtral"), style, fused)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PruningConfig(preset="paper", num_iterations=2, sparsity=0.6, num_calibration_samples=8)
            report = prune_model(model, random_batches(), config)
        assert report.sparsity["achieved"] == pytest.approx(0.6, abs=1e-3)
        assert sum("routes" in reason for reason in report.blocks[0]["dense"].values()) == (model is not mixtral)
        pruned.append([p.matrix for p in describe(model).projections()])
    for expected, found in zip(*pruned, strict=True):
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["gathered", "all"])
def test_routing(style: str, dtype: torch.dtype) -> None:
    """Found by derivatives, against what the router says."""
    model = with_listed_experts(build_model("mixtral").to(dtype), style)
    mixture = model.model.layers[0].mlp
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        routing = routing_in(experts_of(model), (x,), {})
        shares = torch.softmax(mixture.gate(x.flatten(0, 1)).float(), -1)
    assert routing is not None
    assert torch.equal(routing.hidden, x.flatten(0, 1))
    largest = shares >= shares.topk(2).values[:, 1:]
    expected = shares * largest / (shares * largest).sum(-1, keepdim=True)
    for expert in range(4):
        torch.testing.assert_close(routing.of(expert)[1], expected[:, expert].to(dtype).float(), rtol=1e-6, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_routing_in_another_default_dtype() -> None:
    """Lightning's ``bf16-true`` sets it during forwards."""
    model = with_listed_experts(build_model("mixtral").to(torch.bfloat16), "gathered")
    experts = experts_of(model)
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        expected = routing_in(experts, (x,), {})
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = routing_in(experts, (x,), {})
        finally:
            torch.set_default_dtype(torch.float32)
    assert expected is not None
    assert found is not None
    assert torch.equal(found.weights, expected.weights)


class Sharing(nn.Module):
    """A mixture with shared experts, which come first and see all tokens."""

    def __init__(self, mixture: nn.Module, shared: nn.ModuleList) -> None:
        super().__init__()
        self.shared_experts = nn.ModuleList(copy.deepcopy(expert) for expert in list(shared)[:2])
        self.experts, self.gate, self.mixture = mixture.experts, mixture.gate, [mixture]

    def forward(self, x: Tensor) -> Tensor:
        return sum((expert(x) for expert in self.shared_experts), self.mixture[0](x))


@pytest.mark.parametrize("listed", [True, False])
def test_shared_experts_in_a_list_of_their_own(listed: bool) -> None:
    """Beside routed experts as a list, or in three dimensions."""
    mixtral = build_model("mixtral")
    model = with_listed_experts(mixtral)
    shared = model.model.layers[0].mlp.experts
    model = model if listed else mixtral
    for layer in model.model.layers:
        layer.mlp = Sharing(layer.mlp, shared)
    block = describe(model).blocks[0]
    assert {network.output for network in block.networks} == {e.w2 for e in model.model.layers[0].mlp.shared_experts}
    (experts,) = (unit for unit in block.units if isinstance(unit, Experts))
    assert (len(experts.networks), experts.share, experts.listed) == (4, 0.5, listed)
    assert block.dense == ({"model.layers.0.mlp.gate": ROUTES} if listed else {})


def test_experts_that_see_other_inputs_stay_dense() -> None:
    """Tokens times their weights: which token it is cannot be told."""
    model = with_listed_experts(build_model("mixtral"), "weighted")
    block = describe(model).blocks[0]
    assert not any(isinstance(unit, Experts) for unit in block.units)
    assert sum(".experts." in name for name in block.dense) == 12


def test_a_list_of_networks_that_is_no_mixture() -> None:
    """Each sees what the one before gives. They are feed-forward networks on their own."""

    class Sequence(nn.Module):
        def __init__(self, parts: nn.ModuleList) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for part in self.parts:
                y = y + part(y)
            return y - x

    model = with_listed_experts(build_model("mixtral"))
    for layer in model.model.layers:
        layer.mlp = Sequence(layer.mlp.experts)
    block = describe(model).blocks[0]
    assert [type(unit) for unit in block.units[2:]] == [Network] * 4
    assert not block.dense
