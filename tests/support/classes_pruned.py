"""A tiny model of a class, pruned: what the tests assert and the table of models shows."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, load_model, prune_model
from sparsellm_lightning.architecture import DecoderLayout, describe
from support.classes import tiny_model

REFUSED: dict[str, str] = {
    "blt": "holds no list of modules",  # several transformers, on bytes and on patches of them
    "dory": "ran 2 times",
    "gemma4_assistant": "runs on token ids alone",  # drafts from another model's hidden states
    "gemma4_unified_assistant": "runs on token ids alone",
    "hrm_text": "ran 6 times",
    "musicgen": "runs on token ids alone",  # one embedding for each codebook of audio
    "musicgen_melody": "runs on token ids alone",
    "reformer": "returns a ReformerOutput",
    "zamba": "are one parameter",
}
"""Model types that cannot be pruned, each with a part of the message."""


@dataclass(frozen=True)
class Pruned:
    """What pruning a model of a class to 50 % and to 2:4 by the paper's method left.

    Args:
        layout: of the model at 50 %.
        reloaded: largest difference of a logit after export and reload, relative to the largest logit.
        errors: ``‖logits − dense logits‖`` on the calibration windows at 50 %, by this method and by magnitude pruning.
        wrong: projections with another number of zeros than asked for.
    """

    layout: DecoderLayout
    reloaded: float
    errors: tuple[float, float]
    wrong: list[str]

    @property
    def row(self) -> str:
        """Of a Markdown table: networks, experts, share of the blocks' parameters, share of magnitude pruning's error."""
        layout = self.layout
        networks = sum(len(block.networks) for block in layout.blocks)
        pruned = sum(p.size for p in layout.projections())
        total = sum(parameter.numel() for block in layout.blocks for parameter in block.module.parameters())
        share = f"{100 * pruned / total:.0f} %"
        return f"{networks or '-'} | {len(layout.networks) - networks or '-'} | {share} | {self.errors[0] / self.errors[1]:.2f}"


def prune_class(model_type: str, folder: Path) -> Pruned:
    """Prune a tiny model, export it to a folder and load it again.

    Raises:
        UserError: the model is refused.
    """
    model = tiny_model(model_type)
    describe(model)
    dense = logits_of(model)
    ours = pruned(model, sparsity=0.5)
    layout = describe(ours)
    wrong = [p.name for p in layout.projections() if int((p.matrix == 0).sum()) != zeros_wanted(p.shape, p.parts)]
    ours.save_pretrained(folder)
    before, after = logits_of(ours), logits_of(load_model(folder).eval())
    reloaded = float((after - before).abs().max() / before.abs().max())
    by_magnitude = pruned(model, sparsity=0.5, method="magnitude")
    errors = [float((logits_of(other) - dense).norm()) for other in (ours, by_magnitude)]
    for p in describe(pruned(model, pattern="2:4", num_iterations=1)).projections():
        if bool(((p.matrix == 0).unfold(1, 4, 4).sum(-1) < 2).any()):
            wrong.append(f"{p.name} at 2:4")
    return Pruned(layout, reloaded, (errors[0], errors[1]), wrong)


def zeros_wanted(shape: tuple[int, int], parts: tuple[int, ...]) -> int:
    """At 50 %. Each part of a fused matrix is rounded on its own."""
    return sum(round(0.5 * rows * shape[1]) for rows in parts or shape[:1])


def batches() -> list[dict[str, Tensor]]:
    """Eight windows of 32 random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 120, (4, 32), generator=generator)} for _ in range(2)]


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch, use_cache=False).logits for batch in batches()])


def pruned(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    result = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers left dense, few tokens
        prune_model(result, batches(), PruningConfig(preset="paper", num_calibration_samples=8, **settings))
    return result
