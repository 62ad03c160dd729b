"""Tiny models: their configurations, random ones and trained ones, and their tokenizer."""

from __future__ import annotations

import copy
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sparsellm_lightning import TextDataModule
from support.mixtures import ListedMixtralConfig

VOCABULARY = 512
SEQUENCE = 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""Of models that a test configures itself."""
# Token ids inside the tiny vocabulary. Some defaults lie outside.
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
    "phi3": Phi3Config(**_LLAMA_LIKE, rms_norm_eps=1e-6),
    "mixtral": MixtralConfig(**{**_LLAMA_LIKE, "intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2),
    "listed_mixtral": ListedMixtralConfig(
        **{**_LLAMA_LIKE, "intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2
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


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of the Python documentation, equal in every process."""
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


def train(name: str, text: TextDataModule, steps: int = 300) -> PreTrainedModel:
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


def load_or_train(folder: Path, name: str, text: TextDataModule) -> PreTrainedModel:
    """The trained tiny model of that name. It is trained once for all processes that share the folder.

    The folder gets ``name.pt``, the state from which every process loads, and ``name/``, the Hugging Face folder with the
    model and its tokenizer. The global random state stays as it is.
    """
    saved = folder / f"{name}.pt"
    with torch.random.fork_rng(), FileLock(folder / f"{name}.lock"):
        if not saved.exists():
            model = train(name, text)
            model.save_pretrained(folder / name)
            text._get_tokenizer().save_pretrained(folder / name)
            torch.save(model.state_dict(), saved)
        model = build_model(name)
        model.load_state_dict(torch.load(saved))
    return model
