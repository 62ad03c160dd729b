"""The documentation of Python is tokenised once in a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerFast

from sparsellm_lightning import TextDataModule


@contextmanager
def tokenised_once() -> Iterator[None]:
    """Inside this context, datamodules reuse the tokens of a long text that the same tokenizer has tokenised before.

    Hundreds of datamodules tokenise the same documentation, which takes a second each.
    """
    original = TextDataModule._tokenise
    seen: dict[tuple[str, str, str], torch.Tensor] = {}

    def tokenise(data: TextDataModule, text: str) -> torch.Tensor:
        tokenizer = data._get_tokenizer()
        if len(text) < 10_000 or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return original(data, text)
        key = text, tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token
        if key not in seen:
            seen[key] = original(data, text)
        return seen[key].clone()

    TextDataModule._tokenise = tokenise  # type: ignore[method-assign]
    try:
        yield
    finally:
        TextDataModule._tokenise = original  # type: ignore[method-assign]
