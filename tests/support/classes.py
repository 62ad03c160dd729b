"""A tiny random model of every causal-LM class that ``transformers`` registers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.timm_wrapper import modeling_timm_wrapper

# Sizes under every name that configurations give them. A configuration gets those that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size"), 96
    ),
    **dict.fromkeys(("dim_ff", "dff", "inner_dim", "intermediate_size_mlp", "ffn_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "dim_head", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "global_head_dim", "ssm_state_size", "o_lora_rank"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("swa_head_dim", "linear_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"), 0),
}

# What a class needs besides.
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has no groups
_TEXT = {**{key: _SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_DRAFT = {
    "backbone_hidden_size": 64,
    "text_config": {
        **_TEXT,
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 0,
    },
}
MORE: dict[str, dict[str, Any]] = {
    "axk2": _LATENT,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": _LATENT,
    "dots3_note_text": _LATENT,
    "dots3_note": {
        "text_config": _LATENT,
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "fuyu": {"text_config": {**_TEXT, "model_type": "persimmon"}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "glm_moe_dsa": _LATENT,
    "longcat_flash": {"head_dim": 8, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "bamba": {"attn_layer_indices": [1]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "xlm": {"emb_dim": 64},
    "xlnet": {"d_inner": 96},
    "zamba": {"num_hidden_layers": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vq_config": {"base_channels": 32, "hidden_size": 32, "channel_multiplier": [1, 1]}},
    "got_ocr2": {"text_config": {**_TEXT, "model_type": "qwen2"}},
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "moss_transcribe_diarize": {"text_config": {**_TEXT, "model_type": "qwen3"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "moshi": {"audio_vocab_size": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "feed_forward_size": 96,
        "attention_head_size": 16,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # loading sets that row of tied embeddings to zero
    "zaya": {"num_experts_per_tok": 1},
}


def causal_lm_types() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **more: Any) -> PretrainedConfig:
    """A configuration of that type with small sizes, and ``more``."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**{**_settings(cls, MORE.get(model_type, {})), **more})


def _settings(cls: type[PretrainedConfig], more: dict[str, Any]) -> dict[str, Any]:
    """Small sizes of a configuration and of those inside it, and ``more``."""
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__annotations__", {}))
    inside = {
        name: more.get(name, {}) if sub.__name__ == "AutoConfig" else _settings(sub, more.get(name, {}))
        for name, sub in getattr(cls, "sub_configs", {}).items()
        if isinstance(sub, type) and (sub.__name__ != "AutoConfig" or name in more)
    }
    return {**{name: size for name, size in _SIZES.items() if name in known}, **more, **inside}


@contextmanager
def without_timm() -> Iterator[None]:
    """Gemma 3n's image tower is a model of the package ``timm``. An empty module takes its place: it never runs here."""
    with (
        mock.patch.object(modeling_timm_wrapper, "requires_backends"),
        mock.patch.object(modeling_timm_wrapper, "_create_timm_model_with_error_handling", return_value=nn.Module()),
    ):
        yield


def tiny_model(model_type: str, **more: Any) -> PreTrainedModel:
    """A random model, biases and norms included, so that no term is zero by chance."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **more)
    # MusicGen's class takes the configuration of its decoder.
    if hasattr(config, "decoder") and not isinstance(config.decoder, bool):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config.decoder).eval()
    else:
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model
