"""Buffers that keep tokens between uses."""

from __future__ import annotations

import torch

from sparsellm_lightning.solvers import TokenBuffer, moved
from sparsellm_lightning.solvers.storage import Shelf

CPU = torch.device("cpu")


def test_a_shelf_reuses_its_buffers() -> None:
    shelf = Shelf(torch.bfloat16, CPU)
    shelf.put(3, torch.ones(2, 2))
    first = shelf.get(3, CPU)
    shelf.put(3, torch.full((2, 2), 7.0))
    assert torch.equal(shelf.get(3, CPU), torch.full((2, 2), 7.0, dtype=torch.bfloat16))
    assert first.data_ptr() == shelf.get(3, CPU).data_ptr()


def test_a_token_buffer_holds_its_parts_in_order() -> None:
    buffer = TokenBuffer(5, 2, CPU)
    parts = [torch.randn(rows, 2).bfloat16() for rows in (3, 0, 2)]
    for part in parts:
        buffer.add(part)
    assert torch.equal(buffer.filled(), torch.cat(parts))
    assert buffer.filled().dtype == torch.bfloat16


def test_a_token_buffer_without_tokens_is_empty() -> None:
    assert TokenBuffer(0, 2, CPU).filled().shape == (0, 2)


def test_a_tensor_that_is_in_its_place_is_not_copied() -> None:
    tensor = torch.randn(3)
    assert moved(tensor, CPU) is tensor
