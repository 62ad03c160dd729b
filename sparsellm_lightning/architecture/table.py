"""Where each ``model_type`` of ``transformers`` keeps its blocks and projections: one table, one row a model type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsellm_lightning.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """The layout of one ``model_type``.

    Args:
        blocks: attribute path of the list of decoder blocks, from ``model.base_model``.
        attention: attribute paths, inside a block, of the attention's projections, grouped by shared input, in the order of
            evaluation.
        up, down: attribute paths of the feed-forward projections.
        gate: likewise, where the block is gated.
        activation: the config's key for the feed-forward activation.
        additive: (config) -> whether the down projection's output is added to the residual stream and nothing follows. Then a
            change of the feed-forward output changes the block's output by the same amount.
    """

    blocks: str
    attention: tuple[tuple[str, ...], ...]
    up: str
    down: str
    gate: str | None = None
    activation: str = "hidden_act"
    additive: Callable[[Any], bool] = lambda config: True


_SEPARATE_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_LLAMA = Architecture(
    blocks="layers", attention=_SEPARATE_ATTENTION, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"
)
_GEMMA = Architecture(
    blocks="layers",
    attention=_SEPARATE_ATTENTION,
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="hidden_activation",
    additive=lambda config: False,  # a norm follows the down projection
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "opt": Architecture(
        blocks="decoder.layers",
        attention=(_SEPARATE_ATTENTION[0], ("self_attn.out_proj",)),
        up="fc1",
        down="fc2",
        activation="activation_function",
        additive=lambda config: config.do_layer_norm_before,  # false in the 350M layout: a norm follows
    ),
    "gpt2": Architecture(
        blocks="h",
        attention=(("attn.c_attn",), ("attn.c_proj",)),
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation="activation_function",
    ),
    "gpt_neox": Architecture(
        blocks="layers",
        attention=(("attention.query_key_value",), ("attention.dense",)),
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add or replace the row for ``config.model_type``."""
    ARCHITECTURES[model_type] = architecture


def find_architecture(model_type: str) -> Architecture:
    """The row for ``config.model_type``.

    Raises:
        UserError: there is none.
    """
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise UserError(
            f"Architecture {model_type!r} is not in the table. Known: {', '.join(sorted(ARCHITECTURES))}. Add a row: "
            f"sparsellm_lightning.register_architecture({model_type!r}, Architecture(blocks='layers', "
            "attention=(('self_attn.q_proj', ...), ('self_attn.o_proj',)), gate='mlp.gate_proj', up='mlp.up_proj', "
            "down='mlp.down_proj'))."
        )
    return row
