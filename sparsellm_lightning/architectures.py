"""Where a model keeps its blocks, attention projections and feed-forward projections: one table, one row a model type.

Adding a model is adding a row with :func:`register_architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import commonpath, dirname
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.patterns import parse_nofm
from sparsellm_lightning.solvers.activations import Activation, find_activation


@dataclass(frozen=True)
class Architecture:
    """How one ``model_type`` of ``transformers`` is laid out.

    Args:
        blocks: attribute path of the list of decoder blocks, from ``model.base_model``.
        attention: attribute paths inside a block of the attention's projections, grouped by shared input, in the order of
            evaluation.
        up, down: the feed-forward projections; ``gate`` too where the block is gated.
        activation: the config's key for the feed-forward activation.
        additive: (config) -> whether the down projection's output is added to the residual stream and nothing follows.
            Then a new feed-forward output changes the block's output by the difference.
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


# What torch.compile, activation checkpointing, FSDP1 and LoRA put into module names.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer)(\.|$)")


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add (or replace) the row for ``config.model_type``."""
    ARCHITECTURES[model_type] = architecture


@dataclass(frozen=True)
class Projection:
    """One weight to prune.

    Args:
        name: dotted name in the model, without ``.weight``.
        module: ``nn.Linear``, or ``Conv1D`` whose weight is stored transposed.
        pruned: False where ``skip`` leaves it dense.
    """

    name: str
    module: nn.Module
    pruned: bool

    @property
    def transposed(self) -> bool:
        """Whether the module stores (in, out) rather than (out, in)."""
        return isinstance(self.module, Conv1D)

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features), of the whole weight."""
        # From the module: the parameter of a sharded one may be a flat piece.
        module: Any = self.module
        return (module.nf, module.nx) if self.transposed else (module.out_features, module.in_features)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class Block:
    """One decoder block: its module, and its projections in the order of evaluation."""

    index: int
    name: str
    module: nn.Module
    attention: list[list[Projection]]
    feed_forward: dict[str, Projection]  # "gate" (when gated), "up", "down"
    attention_module: nn.Module | None = None  # the module that holds the attention's projections, and nothing else

    def projections(self) -> Iterator[Projection]:
        for group in self.attention:
            yield from group
        yield from self.feed_forward.values()

    def forward_work(self, window: int, until: int | None = None) -> int:
        """Floating-point operations a token of the products in a forward: projections, and causal attention.

        Args:
            window: tokens that attend to each other.
            until: stop in front of this group of attention projections; their number: in front of the feed-forward network.
        """
        groups = self.attention[:until]
        layers = [p for group in groups for p in group] + (list(self.feed_forward.values()) if until is None else [])
        # Queries times keys, weights times values: half of each, being causal, over the features that leave the heads.
        attends = until is None or until >= max(len(self.attention) - 1, 1)
        attention = 2 * window * self.attention[-1][0].shape[1] if attends else 0
        return attention + sum(2 * p.shape[0] * p.shape[1] for p in layers)


@dataclass(frozen=True)
class DecoderLayout:
    """A model seen as a list of blocks."""

    model: PreTrainedModel
    blocks: list[Block]
    activation: Activation
    additive: bool

    def projections(self) -> Iterator[Projection]:
        for block in self.blocks:
            yield from block.projections()


def describe(model: PreTrainedModel, config: PruningConfig) -> DecoderLayout:
    """Find a model's blocks and projections, and check that ``config`` can be applied to them.

    Raises:
        UserError: an unknown architecture, a skip pattern that matches nothing, columns that do not divide by the N:M
            group, or block indices outside the model.
    """
    row, model_type = _row(model), model.config.model_type
    names = unwrapped_names(model)
    unmatched = set(config.skip)

    def projection(block: nn.Module, path: str) -> Projection:
        module = _get(block, path, model_type)
        module = getattr(module, "base_layer", module)  # under a LoRA adapter
        name = names[module]
        matching = {
            pattern for pattern in config.skip if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        }
        unmatched.difference_update(matching)
        return Projection(name, module, pruned=not matching)

    blocks = []
    for index, module in enumerate(decoder_blocks(model)):
        attention = [[projection(module, path) for path in group] for group in row.attention]
        paths = {"gate": row.gate, "up": row.up, "down": row.down}
        feed_forward = {role: projection(module, path) for role, path in paths.items() if path is not None}
        holder = commonpath([dirname("/" + path.replace(".", "/")) for group in row.attention for path in group])[1:]
        blocks.append(
            Block(
                index,
                names[module],
                module,
                attention,
                feed_forward,
                module.get_submodule(holder.replace("/", ".")) if holder else None,
            )
        )
    layout = DecoderLayout(
        model, blocks, find_activation(getattr(model.config, row.activation)), row.additive(model.config)
    )
    if unmatched:
        raise UserError(
            f"Every skip pattern must match a projection; {sorted(unmatched)} match none. The first block's projections "
            f"are {', '.join(p.name for p in blocks[0].projections())}; embeddings, norms and the head are never pruned."
        )
    _check_groups(layout, config)
    config.globally_solved(len(blocks))
    return layout


def unwrapped_names(module: nn.Module) -> dict[nn.Module, str]:
    """Every module inside by its dotted name, as if nothing wrapped any of them."""
    return {child: _WRAPPERS.sub("", name).rstrip(".") for name, child in module.named_modules()}


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder blocks, in order.

    Raises:
        UserError: an unknown architecture.
    """
    return list(_get(model.base_model, _row(model).blocks, model.config.model_type))


def _row(model: PreTrainedModel) -> Architecture:
    model_type = model.config.model_type
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise UserError(
            f"Architecture {model_type!r} is not in the table. Known: {', '.join(sorted(ARCHITECTURES))}. Add a row: "
            f"sparsellm_lightning.register_architecture({model_type!r}, Architecture(blocks='layers', "
            "attention=(('self_attn.q_proj', ...), ('self_attn.o_proj',)), gate='mlp.gate_proj', up='mlp.up_proj', "
            "down='mlp.down_proj'))."
        )
    return row


def find_model(module: nn.Module, attribute: str | None = None) -> PreTrainedModel:
    """The ``transformers`` model that a LightningModule holds, found by type.

    Args:
        module: the LightningModule (or a model itself).
        attribute: dotted attribute to take, where there are several.

    Raises:
        UserError: none, or several and no ``attribute``.
    """
    if attribute is not None:
        try:
            found = module.get_submodule(attribute)
        except AttributeError:
            found = None
        if not isinstance(found, PreTrainedModel):
            raise UserError(
                f"model_attribute must name a transformers PreTrainedModel, but {type(module).__name__}.{attribute} is "
                f"{'missing' if found is None else type(found).__name__}. Candidates: {_candidates(module) or 'none'}."
            )
        return found
    candidates = _candidates(module)
    if len(candidates) != 1:
        what = "none" if not candidates else ", ".join(candidates)
        raise UserError(
            f"{type(module).__name__} must hold exactly one transformers PreTrainedModel to prune, found {what}. "
            + (
                "Name it with model_attribute."
                if candidates
                else "Assign one to an attribute, or in configure_model()."
            )
        )
    return next(iter(candidates.values()))


def _candidates(module: nn.Module) -> dict[str, PreTrainedModel]:
    """Outermost models by name: a causal LM's own base model is not another candidate."""
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in found)
        if isinstance(child, PreTrainedModel) and not inside:
            found[name] = child
    return found


def _check_groups(layout: DecoderLayout, config: PruningConfig) -> None:
    nofm = parse_nofm(config.pattern)
    if nofm is None:
        return
    wrong = [f"{p.name} ({p.shape[1]})" for p in layout.projections() if p.pruned and p.shape[1] % nofm[1]]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"Pattern {config.pattern} needs input features that divide by {nofm[1]}, not so in {', '.join(wrong[:4])}{more}."
            " Choose another pattern, or leave these dense with skip."
        )


def _get(module: nn.Module, path: str, model_type: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise UserError(
            f"The table's row for {model_type!r} names {path!r}, which {type(module).__name__} does not have ({error}). "
            "Correct the row with register_architecture."
        ) from None


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next(model.parameters()).device
