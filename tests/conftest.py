"""Tiny models that the session trains on the Python documentation, well under a minute each."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is loaded: workers would otherwise each use every core.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sparsellm_lightning.data import TextDataModule

VOCABULARY = 512
SEQUENCE = 64

# vocab_size, and token ids inside it: the defaults of some configs lie outside a tiny vocabulary.
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_OPT: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA_LIKE),
    "mistral": MistralConfig(**_LLAMA_LIKE, sliding_window=16),
    "qwen2": Qwen2Config(**_LLAMA_LIKE),
    "qwen3": Qwen3Config(**_LLAMA_LIKE),
    "gemma2": Gemma2Config(**_LLAMA_LIKE, sliding_window=16),
    "gemma3": Gemma3TextConfig(**{**_LLAMA_LIKE, "num_hidden_layers": 7}, sliding_window=16),
    "opt": OPTConfig(**_OPT),
    "opt-350m": OPTConfig(**{**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt2": GPT2Config(
        **_COMMON, n_embd=64, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt_neox": GPTNeoXConfig(
        **_COMMON,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
}


def build_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised tiny model, biases and norms included, so that no term is zero by chance."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


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


def _train(name: str, text: TextDataModule, steps: int = 300) -> PreTrainedModel:
    model = build_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from text.train_dataloader()

    for _, batch in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


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
