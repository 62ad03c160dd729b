"""Tiny models that the session trains on the Python documentation, well under a minute each."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is loaded: workers would otherwise each use every core.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsellm_lightning.data import TextDataModule

# vocab_size, and token ids inside it: the defaults of some configs lie outside a tiny vocabulary.


@pytest.fixture(scope="session", autouse=True)
def _tokenised_once() -> Iterator[None]:
    """Hundreds of datamodules of this session tokenise the same documentation with the same tokenizer, a second each."""
    original, seen = TextDataModule._tokenise, {}

    def tokenise(data: TextDataModule, text: str) -> torch.Tensor:
        tokenizer = data._get_tokenizer()
        if len(text) < 10_000 or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return original(data, text)
        key = text, tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token
        if key not in seen:
            seen[key] = original(data, text)
        return seen[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextDataModule, "_tokenise", tokenise)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    import pydoc_data.topics

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(list(pydoc_data.topics.topics.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="session")
def text(tokenizer: PreTrainedTokenizerFast) -> TextDataModule:
    return TextDataModule(
        "python-docs", sequence_length=SEQUENCE, batch_size=16, max_eval_windows=64, tokenizer=tokenizer
    )


@pytest.fixture(scope="session")
def _trained(text: TextDataModule) -> Callable[[str], PreTrainedModel]:
    cache: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in cache:
            cache[name] = _train(name, text)
        return cache[name]

    return get


@pytest.fixture
def trained(_trained: Callable[[str], PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """``trained(name)``: a copy of the tiny model of that name, trained once in the session."""
    return lambda name: copy.deepcopy(_trained(name))


@pytest.fixture(scope="session")
def model_dir(
    tmp_path_factory: pytest.TempPathFactory,
    _trained: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The trained tiny LLaMA as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    _trained("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def calibration(text: TextDataModule) -> list[dict[str, torch.Tensor]]:
    return list(text.calibration_dataloader(num_samples=64, seed=0))
