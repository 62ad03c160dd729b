"""Quality presets: what they stand for, what overrides them, and how they are written on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsellm_lightning import PruningConfig, SparseLLMCallback, UserError
from sparsellm_lightning.cli import PruningTrainer, SparseLLMCLI, main
from sparsellm_lightning.config import DEFAULTS, PRESETS, Reconstruction
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.models import CausalLM

EXPLICIT: dict[str, Any] = {
    "method": "wanda",
    "local_solver": "admm",
    "num_iterations": 7,
    "target": "model",
    "allocation": "owl",
    "refine": "mask",
    "reconstruct": Reconstruction(steps=3, learning_rate=1e-2, batch_tokens=100, others=False),
    "continuations": 3,
    "damping": 0.05,
}


def settings_of(config: PruningConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DEFAULTS}


@pytest.mark.parametrize("quality", [None, *PRESETS])
@pytest.mark.parametrize("through", [PruningConfig, SparseLLMCallback])
def test_what_they_stand_for(quality: Any, through: Any) -> None:
    made = through(preset=quality)
    config = made if through is PruningConfig else made.config
    assert settings_of(config) == {**DEFAULTS, **PRESETS.get(quality, {})}
    assert config.quality == quality


@pytest.mark.parametrize("quality", [None, *PRESETS])
def test_the_callback_has_the_defaults_of_its_settings(quality: Any) -> None:
    assert SparseLLMCallback(preset=quality).config == PruningConfig(preset=quality)


def test_every_preset_sets_what_it_may() -> None:
    assert list(PRESETS) == ["fast", "balanced", "best"]
    for preset in PRESETS.values():
        assert set(preset) <= set(DEFAULTS)


@pytest.mark.parametrize("quality", PRESETS)
@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_arguments_win(quality: Any, name: str) -> None:
    config = PruningConfig(preset=quality, **{name: EXPLICIT[name]})
    expected = {**DEFAULTS, **PRESETS[quality], name: EXPLICIT[name]}
    assert settings_of(config) == expected


@pytest.mark.parametrize("quality", PRESETS)
def test_all_explicit(quality: Any) -> None:
    assert settings_of(PruningConfig(preset=quality, **EXPLICIT)) == EXPLICIT
    plain = settings_of(PruningConfig(preset=quality, **DEFAULTS))
    assert plain == DEFAULTS, "a default given is not a default"


@pytest.mark.parametrize(
    ("quality", "method", "target"), [("balanced", "sparsegpt", "block"), ("best", "wanda", "block")]
)
def test_no_target_is_left_over(quality: Any, method: Any, target: str) -> None:
    """Without reconstruction or alternation nothing fits the preset's target."""
    config = PruningConfig(preset=quality, method=method, reconstruct=False)
    assert (config.target, config.reconstruct) == (target, False)
    kept = PruningConfig(preset=quality, method="sparsellm", reconstruct=False)
    assert kept.target == "model", "the alternation does"
    with pytest.raises(UserError, match="target='model'"):
        PruningConfig(preset=quality, method=method, reconstruct=False, target="model")


@pytest.mark.parametrize("quality", PRESETS)
def test_nofm_patterns_have_no_allocation(quality: Any) -> None:
    config = PruningConfig(preset=quality, pattern="2:4")
    assert settings_of(config) == {**DEFAULTS, **PRESETS[quality], "allocation": "uniform"}
    with pytest.raises(UserError, match=r"allocation error.*pattern 2:4"):
        PruningConfig(preset=quality, pattern="2:4", allocation="kl")


@pytest.mark.parametrize("quality", ["good", "Best", "", 1])
@pytest.mark.parametrize("through", [PruningConfig, SparseLLMCallback])
def test_unknown(quality: Any, through: Any) -> None:
    with pytest.raises(UserError, match="quality must be one of fast, balanced, best, got") as caught:
        through(preset=quality)
    assert repr(quality) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (0, -1, 2.5, True)),
        *(("batch_tokens", value) for value in (0, 1.5)),
        *(("learning_rate", value) for value in (0, -1e-3, float("nan"), float("inf"))),
    ],
)
def test_reconstruction_is_checked(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"reconstruct\.{name}.*got"):
        PruningConfig(preset="paper", reconstruct=Reconstruction(**{name: value}))


@pytest.mark.parametrize("value", [True, {"steps": 8}, 8, "yes"])
def test_what_is_no_reconstruction_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="reconstruct"):
        PruningConfig(preset="paper", reconstruct=value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("refine", ["masks", ""]),
        ("allocation", ["alphapruning", ""]),
        ("allocation_spread", [-0.1, 1.0, float("nan")]),
        ("held_out", [-0.1, 0.6, float("nan")]),
    ],
)
def test_other_settings_are_checked(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"{name} must be.*got"):
            PruningConfig(**{name: value})


ARGUMENTS = ["prune", "--model.pretrained=none", "--trainer.accelerator=cpu", "--trainer.logger=false"]


def from_command_line(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> PruningConfig:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(PruningTrainer, "prune", lambda self, model, datamodule: None)
    cli = SparseLLMCLI(
        *(CausalLM, TextDataModule),
        trainer_class=PruningTrainer,
        auto_configure_optimizers=False,
        args=[*ARGUMENTS, *arguments],
    )
    return next(c for c in cli.trainer.callbacks if isinstance(c, SparseLLMCallback)).config  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("--pruner.quality balanced", {}),
        ("--pruner.quality balanced --pruner.reconstruct.steps 8", {"reconstruct": Reconstruction(steps=8)}),
        (
            "--pruner.reconstruct.steps 8 --pruner.quality balanced --pruner.reconstruct.learning_rate 1e-3",
            {"reconstruct": Reconstruction(steps=8, learning_rate=1e-3)},
        ),
        ("--pruner.quality balanced --pruner.reconstruct false", {"reconstruct": False, "target": "block"}),
        ("--pruner.quality balanced --pruner.refine mask --pruner.target block", {"refine": "mask", "target": "block"}),
    ],
)
def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: str, changed: dict[str, Any]) -> None:
    config = from_command_line(monkeypatch, tmp_path, *arguments.split())
    assert config.quality == "balanced"
    assert settings_of(config) == {**DEFAULTS, **PRESETS["balanced"], **changed}


def test_command_line_without_quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings_of(from_command_line(monkeypatch, tmp_path)) == DEFAULTS
    config = from_command_line(monkeypatch, tmp_path, "--pruner.reconstruct.steps", "8")
    assert settings_of(config) == {**DEFAULTS, "reconstruct": Reconstruction(steps=8)}


@pytest.mark.parametrize(
    ("value", "expected"), [("false", False), ("{steps: 5, others: false}", Reconstruction(steps=5, others=False))]
)
def test_configuration_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, expected: Any) -> None:
    (tmp_path / "config.yaml").write_text(f"pruner: {{quality: best, reconstruct: {value}}}\n")
    config = from_command_line(monkeypatch, tmp_path, "--config", "config.yaml")
    target = "model" if expected else "block"  # which nothing else of the preset fits
    assert settings_of(config) == {**DEFAULTS, **PRESETS["best"], "reconstruct": expected, "target": target}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--pruner.quality good", "pruner.quality"),
        ("--pruner.reconstruct.step 8", "pruner.reconstruct"),
        ("--pruner.reconstruct.steps 0", "reconstruct.steps"),
    ],
)
def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], arguments: str, named: str) -> None:
    """One message, as ever; jsonargparse refuses what the types do, the settings the rest."""
    with pytest.raises(SystemExit) as caught:
        main([*ARGUMENTS, *arguments.split()])
    assert caught.value.code
    assert named in capsys.readouterr().err
