"""Masks of pruned weights, packed as bits, without a Trainer."""

from __future__ import annotations

import pytest
import torch
from support.models import build_model
from torch import Tensor, nn

from sparsellm_lightning.architecture import describe, linear_projection
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.errors import MaskError
from sparsellm_lightning.sparsity import Masks, linear_layers, pack, unpack


def one_layer(weight: Tensor) -> tuple[nn.Linear, Masks]:
    """Masks of the zeros of a single layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer, Masks([linear_projection("layer", layer)], StrategyAdapter())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (7,), (8,), (9,), (3, 5), (4, 4), (13, 17), (2, 3, 5)])
def test_packed_bits(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.5
    flat = mask.flatten().tolist()
    expected = [0] * ((len(flat) + 7) // 8)
    for index, bit in enumerate(flat):
        expected[index // 8] |= bit << index % 8
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    restored = unpack(packed, mask.shape)
    assert restored.dtype == torch.bool
    assert torch.equal(restored, mask)


def test_packed_view() -> None:
    """A transposed weight, as of GPT-2's Conv1D, is not contiguous."""
    mask = torch.rand(6, 11) < 0.5
    assert torch.equal(unpack(pack(mask.T), mask.T.shape), mask.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_kept_weight_at_zero_stays_distinguishable(dtype: torch.dtype) -> None:
    layer, masks = one_layer(torch.tensor([[0.0, 1, 2, 0], [3, 0, 0, -4]], dtype=dtype))
    layer.weight.data = torch.tensor([[5.0, 0, 2, -1], [-0.0, 6, 0, -4]], dtype=dtype)
    masks.apply()
    tiny = torch.finfo(dtype).tiny
    assert torch.equal(layer.weight.data, torch.tensor([[0.0, tiny, 2, 0], [tiny, 0, 0, -4]], dtype=dtype))
    assert masks.zeros == {"layer": 4}
    assert int((layer.weight == 0).sum()) == 4
    masks.check()


def test_moments_are_cleared_by_shape_and_kind() -> None:
    layer, masks = one_layer(torch.tensor([[0.0, 1], [2, 0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1)
    codes = torch.ones(2, 2, dtype=torch.uint8)  # quantised: 0 is the code of another number
    state = {"full": torch.ones(2, 2), "step": torch.tensor(3.0), "row": torch.ones(2), "codes": codes, "name": "x"}
    optimizer.state[layer.weight] = dict(state)
    masks.clear_moments([optimizer])
    assert torch.equal(optimizer.state[layer.weight]["full"], torch.tensor([[0.0, 1], [1, 0]]))
    assert torch.equal(optimizer.state[layer.weight]["row"], torch.ones(2))
    assert optimizer.state[layer.weight]["step"] == 3
    assert int(codes.sum()) == 4


def test_check_names_the_layer_and_both_counts() -> None:
    layer, masks = one_layer(torch.tensor([[0.0, 1, 2, 0], [3, 0, 0, -4]]))
    masks.check()
    with torch.no_grad():
        layer.weight[0, 0] = 1e-30
    with pytest.raises(MaskError, match=r"layer .*4 zeros \(50.0000 %\).*has 3 \(37.5000 %\), 1 of its weights"):
        masks.check()
    with torch.no_grad():  # the number of zeros is right, but not their places
        layer.weight[0, 1] = 0
    with pytest.raises(MaskError, match=r"layer .*4 zeros.*has 4 .*, 2 of its weights"):
        masks.check()


@pytest.mark.parametrize("name", ["mixtral", "phi3"])
def test_zeros_of_fused_parameters(name: str) -> None:
    """One mask for each parameter, whichever part of it a projection is."""
    model = build_model(name)
    projections = list(describe(model).projections())
    for p in projections:
        p.matrix[:, ::2] = 0
    masks = Masks(projections, StrategyAdapter())
    assert len(masks.projections) == len({id(p.parameter) for p in projections}) < len(projections)
    assert sum(masks.zeros.values()) == sum(p.size for p in projections) // 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(MaskError):
        masks.check()
    masks.apply()
    masks.check()
    assert all(bool((p.matrix[:, ::2] == 0).all()) for p in projections)
    assert {p.name for p in masks.projections} <= {p.name for p in linear_layers(model)}
