"""Every causal-LM class that ``transformers`` registers, pruned as a tiny random model.

``pytest -m "slow or not slow" tests/architecture/test_every_class.py -s`` prints the table of coverage.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.classes import causal_lm_types, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.architecture import describe

REFUSED: dict[str, str] = {
    "blt": "holds no list of modules",  # several transformers, on bytes and on patches of them
    "dory": "ran 2 times",
    "gemma4_assistant": "runs on token ids alone",  # drafts from another model's hidden states
    "gemma4_unified_assistant": "runs on token ids alone",
    "hrm_text": "ran 6 times",
    "musicgen": "runs on token ids alone",  # one embedding for each codebook of audio
    "musicgen_melody": "runs on token ids alone",
    "reformer": "is called again",
    "xlnet": "batch, sequence",
    "zamba": "are one parameter",
}
"""Model types that cannot be pruned, each with a part of the message."""

NOT_BUILT = {"gemma3n": "timm"}
"""Model types whose class needs a package that the tests do not install."""

QUICK = [
    "phi3",
    "falcon",
    "gptj",
    "olmo2",
    "granite",
    "bloom",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "mamba",
]
"""One of each kind, which the suite runs without ``-m slow``."""


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


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in causal_lm_types()]
)
def test_class(model_type: str, tmp_path: Path) -> None:
    """Exact zeros, equal logits after a reload, and a smaller error than magnitude pruning's."""
    if model_type in NOT_BUILT:
        pytest.skip(f"needs {NOT_BUILT[model_type]}")
    model = tiny_model(model_type)
    if model_type in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model_type]):
            describe(model)
        print(f"\n| `{model_type}` | refused: {REFUSED[model_type]} |")
        return
    dense = logits_of(model)
    ours = pruned(model, sparsity=0.5)
    layout = describe(ours)
    for p in layout.projections():
        matrix = p.matrix
        if not p.parts:
            assert int((matrix == 0).sum()) == round(0.5 * p.size), p.name
    ours.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(reloaded), logits_of(ours), rtol=1e-4, atol=1e-5)
    by_magnitude = pruned(model, sparsity=0.5, method="magnitude")
    errors = [float((logits_of(other) - dense).norm()) for other in (ours, by_magnitude)]
    assert errors[0] < errors[1]
    grouped = pruned(model, pattern="2:4")
    for p in describe(grouped).projections():
        zeros = (p.matrix == 0).unfold(1, 4, 4).sum(-1)
        assert bool((zeros >= 2).all()), p.name
    share = sum(p.size for p in layout.projections()) / sum(
        parameter.numel() for block in layout.blocks for parameter in block.module.parameters()
    )
    experts = sum(len(layout.networks) for _ in [0]) - sum(len(block.networks) for block in layout.blocks)
    found = f"{sum(len(block.networks) for block in layout.blocks)} networks, {experts} experts"
    print(
        f"\n| `{model_type}` | {found} | {100 * share:.0f} % of the blocks' parameters | {errors[0] / errors[1]:.2f} |"
    )
