"""A causal language model outside ``transformers``: Mixtral with its experts as a list of modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel


class ListedMixtralConfig(MixtralConfig):
    """Its mixtures.

    ``style``: ``gathered``: an expert sees its tokens. ``all``: an expert sees all tokens. ``pair``: as ``gathered``, and a
    mixture returns the router's logits too. ``weighted``: an expert sees its tokens times their weights. ``above``: as
    ``gathered``, with all experts whose weight is above 0.2.

    ``fused``: whether an expert's gate and up are one matrix.
    """

    model_type = "listed_mixtral"
    style: str = "gathered"
    fused: bool = False


class Expert(nn.Module):
    def __init__(self, config: ListedMixtralConfig) -> None:
        super().__init__()
        width, d = config.intermediate_size, config.hidden_size
        rows = [2 * width] if config.fused else [width, width]
        self.first = nn.ModuleList(nn.Linear(d, size, bias=False) for size in rows)
        self.w2 = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.first[0](x).chunk(2, -1) if len(self.first) == 1 else [linear(x) for linear in self.first]
        return self.w2(nn.functional.silu(gate) * up)


class Mixture(nn.Module):
    def __init__(self, config: ListedMixtralConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))
        self.style, self.chosen = config.style, config.num_experts_per_tok

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = self.gate(x)
        weights, chosen = torch.softmax(logits.float(), -1).topk(4 if self.style == "above" else self.chosen)
        if self.style == "above":
            weights = weights * (weights > 0.2)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        total = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where((chosen == index) & (weights > 0))
            weight = weights[token, slot, None]
            if self.style == "all":
                total = total + expert(x) * (weights * (chosen == index)).sum(-1, keepdim=True)
            elif self.style == "weighted":
                total.index_add_(0, token, expert(x[token] * weight))
            elif len(token):
                total.index_add_(0, token, expert(x[token]) * weight)
        total = total.view(hidden.shape)
        return (total, logits) if self.style == "pair" else total


class First(nn.Module):
    """The first of the values that a mixture returns."""

    def __init__(self, config: ListedMixtralConfig) -> None:
        super().__init__()
        self.mixture = Mixture(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mixture(hidden)[0]


class ListedMixtralForCausalLM(MixtralForCausalLM):
    config_class = ListedMixtralConfig

    def __init__(self, config: ListedMixtralConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = (First if config.style == "pair" else Mixture)(config)
        self.post_init()


AutoConfig.register("listed_mixtral", ListedMixtralConfig)
AutoModelForCausalLM.register(ListedMixtralConfig, ListedMixtralForCausalLM)


def with_listed_experts(mixtral: PreTrainedModel, style: str = "gathered", fused: bool = False) -> PreTrainedModel:
    """The same model with its experts as modules."""
    settings = {key: value for key, value in mixtral.config.to_dict().items() if key != "model_type"}
    listed = ListedMixtralForCausalLM(ListedMixtralConfig(**settings, style=style, fused=fused)).eval()
    listed.load_state_dict(mixtral.state_dict(), strict=False)
    with torch.no_grad():
        for layer, new in zip(mixtral.model.layers, listed.model.layers, strict=True):
            mixture = new.mlp.mixture if style == "pair" else new.mlp
            mixture.gate.weight.copy_(layer.mlp.gate.weight)
            experts = layer.mlp.experts
            for expert, first, down in zip(mixture.experts, experts.gate_up_proj, experts.down_proj, strict=True):
                for linear, weight in zip(expert.first, [first] if fused else first.chunk(2), strict=True):
                    linear.weight.copy_(weight)
                expert.w2.weight.copy_(down)
    return listed.to(mixtral.dtype)
