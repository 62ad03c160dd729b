"""Every causal-LM class that ``transformers`` registers, pruned as a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.classes import causal_lm_types, without_timm
from support.classes_pruned import REFUSED, prune_class

from sparsellm_lightning import UserError

QUICK = ["falcon", "gptj", "granite", "bloom", "qwen2_moe", "gpt_oss", "mamba"]
"""One of each kind, which the suite runs without ``-m slow``."""


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in causal_lm_types()]
)
@without_timm()
def test_class(model_type: str, tmp_path: Path) -> None:
    """Exact zeros, equal logits after a reload, and a smaller error than magnitude pruning's."""
    if model_type in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model_type]):
            prune_class(model_type, tmp_path)
        return
    pruned = prune_class(model_type, tmp_path)
    assert not pruned.wrong
    assert pruned.reloaded < 1e-4
    assert pruned.errors[0] < pruned.errors[1]


def test_at_most_one_in_twenty_is_refused() -> None:
    assert len(REFUSED) <= 0.05 * len(causal_lm_types())
