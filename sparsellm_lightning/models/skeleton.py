"""A model from its configuration alone, with random weights that share memory."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from sparsellm_lightning.architecture import DecoderLayout, describe
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.models.loading import locate, or_user_error

_SHIFT = 64 * 31  # elements from one parameter of a shape to the next, for aligned memory and weights that differ


def inspect_model(pretrained: str, config: PruningConfig | None = None) -> DecoderLayout:
    """The structure of a model, from its configuration. No weights are read or downloaded.

    Parameters of one shape share memory. So a model of any size takes little more of it than its embeddings and one block.

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
    _fill(model)
    return describe(model, config)


def _fill(model: nn.Module) -> None:
    """Give every parameter random values: a stretch of those of its shape, which starts elsewhere for each parameter."""
    shared: dict[torch.Size, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    places = Counter(parameter.shape for parameter in parameters)
    for parameter in parameters:
        shape, size = parameter.shape, parameter.numel()
        if shape not in shared:
            # Norms' weights are near 1. Matrices keep the scale of what they multiply.
            mean, deviation = (1.0, 0.1) if len(shape) < 2 else (0.0, shape[-1] ** -0.5)
            values = torch.empty(size + _SHIFT * places[shape], dtype=parameter.dtype)
            shared[shape] = values.normal_(mean, deviation, generator=generator)
        places[shape] -= 1
        start = _SHIFT * places[shape]
        parameter.data = shared[shape][start : start + size].view(shape)
