"""The head on some positions, and in another dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import random_batches
from support.models import build_model
from torch.utils._python_dispatch import TorchDispatchMode

from sparsellm_lightning.models import decoder_output, head_in, logits_at


class Operations(TorchDispatchMode):
    """Records the names of operations, and the shapes of what they are given first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, tuple[int, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.first[func.overloadpacket.__name__] = getattr(args[0], "shape", ()) if args else ()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("windows", [1, 3])
@torch.no_grad()
def test_logits_of_some_positions(windows: int) -> None:
    """They are those of a whole forward, by one product with the weights first, which is faster than window by window."""
    model = build_model("llama").requires_grad_(False)
    ids = random_batches()[1]["input_ids"][:windows]
    whole = model(input_ids=ids).logits
    output = decoder_output(model, lambda: model(input_ids=ids).logits, tuple(ids.shape))
    with Operations() as operations:
        found = logits_at(model, lambda: model(input_ids=ids).logits, output, output.last_hidden_state[:, 5:9])
    torch.testing.assert_close(found, whole[:, 5:9])
    assert operations.first["mm"] == model.get_output_embeddings().weight.shape
    assert "bmm" not in operations.first


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt-350m"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_rounded_head_gives_the_logits_of_autocast(name: str, tied: bool) -> None:
    model = build_model(name)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not tied:
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.3)
    else:
        head.weight = embeddings.weight
    before, batch = head.weight, random_batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        with head_in(model, torch.bfloat16):
            assert head.weight.dtype == torch.bfloat16
            assert embeddings.weight.dtype == torch.float32
            assert torch.equal(model(**batch).logits, expected)
    assert head.weight is before
    with head_in(model, None):
        assert head.weight is before


def test_the_weight_comes_back_after_an_error() -> None:
    model = build_model("llama")
    before = model.get_output_embeddings().weight
    with pytest.raises(KeyError), head_in(model, torch.bfloat16):
        raise KeyError
    assert model.get_output_embeddings().weight is before
