"""A model from its configuration alone, whose blocks have random weights only while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from sparsellm_lightning.architecture import DecoderLayout, decoder_blocks, describe
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.models.loading import locate, or_user_error


def inspect_model(pretrained: str, config: PruningConfig | None = None) -> DecoderLayout:
    """The structure of a model, from its configuration. No weights are read or downloaded.

    A block's weights are in memory only while the probe runs it. So a model of any size takes little more memory than its
    embeddings and one block.

    Args:
        pretrained: as for :func:`~sparsellm_lightning.load_model`. A configuration is enough.
        config: settings. None: the default settings, under which every projection is pruned.

    Raises:
        UserError: there is no such configuration, or the model cannot be pruned.
    """
    source, gguf_file = locate(pretrained)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}

    def build() -> PreTrainedModel:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)  # nosec B615
        with no_init_weights():  # the system gives pages to a tensor when it is written
            model: PreTrainedModel = AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16)
        model.tie_weights()  # part of the initialisation
        return model

    model = or_user_error(pretrained, build)
    with _filled_in_turn(model):
        return describe(model, config)


@contextmanager
def _filled_in_turn(model: PreTrainedModel) -> Iterator[None]:
    """Each block has random weights during its own forward, the same ones every time. The rest of the model always has."""
    blocks = {block: index for index, block in enumerate(decoder_blocks(model))}
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    with torch.no_grad(), ExitStack() as hooks:
        _fill([parameter for parameter in model.parameters() if id(parameter) not in inside], seed=len(blocks))
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(lambda m, args: _fill(m.parameters(), blocks[m])).remove)
            hooks.callback(block.register_forward_hook(lambda m, args, output: _empty(m)).remove)
        yield


def _fill(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        # Norms' weights are near 1. Matrices keep the scale of what they multiply.
        if parameter.dim() < 2:
            parameter.normal_(1.0, 0.1, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def _empty(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.data = torch.empty_like(parameter)
