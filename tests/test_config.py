"""Settings: presets, defaults, refused values, and settings on the command line."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import instantiate, pruner_of

from sparsellm_lightning import PruningConfig, SparseLLMCallback, UserError
from sparsellm_lightning.cli import main
from sparsellm_lightning.config import PRESETS
from sparsellm_lightning.data import synthetic
from sparsellm_lightning.pipeline import distil
from sparsellm_lightning.solvers import SINGLE, NofM, Penalties, Ranks, Unstructured

NAN, INF = float("nan"), float("inf")

# -- Presets ----------------------------------------------------------------------------------------------------------

# For each setting that presets decide, a value. Only target's value is also a preset's.
GIVEN: dict[str, Any] = {
    "method": "wanda",
    "local_solver": "magnitude",
    "num_iterations": 7,
    "target": "model",
    "allocation": "owl",
    "reconstruction_steps": 3,
    "distillation_steps": 2,
    "continuations": 5,
    "damping": 0.05,
}


def decided(config: PruningConfig) -> dict[str, Any]:
    """The settings that presets decide."""
    return {name: getattr(config, name) for name in GIVEN}


FEW: dict[str, Any] = {"num_calibration_samples": 32}  # for more, presets have more steps


def test_every_preset_decides_the_same_settings() -> None:
    assert list(PRESETS) == ["paper", "fast", "balanced", "best"]
    for preset in PRESETS.values():
        assert set(preset) == set(GIVEN)
        assert all(preset[name] is not None for name in preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_values(preset: Any) -> None:
    config = PruningConfig(preset=preset, **FEW)
    assert config.preset == preset
    assert decided(config) == PRESETS[preset]
    assert SparseLLMCallback(preset=preset, **FEW).config == config


@pytest.mark.parametrize(
    ("preset", "windows", "steps"),
    [
        *(
            ("balanced", 1, (24, 40)),
            ("balanced", 32, (24, 40)),
            ("balanced", 33, (24, 41)),
            ("balanced", 128, (96, 160)),
        ),
        *(("best", 8, (128, 128)), ("best", 128, (512, 512)), ("fast", 128, (24, 0)), ("paper", 128, (0, 0))),
    ],
)
def test_presets_tune_on_more_text_in_more_steps(preset: Any, windows: int, steps: tuple[int, int]) -> None:
    config = PruningConfig(preset=preset, num_calibration_samples=windows)
    assert (config.reconstruction_steps, config.distillation_steps) == steps
    given: dict[str, Any] = {"reconstruction_steps": 5, "distillation_steps": 7}
    config = PruningConfig(preset=preset, num_calibration_samples=windows, **given)
    assert (config.reconstruction_steps, config.distillation_steps) == (5, 7)


def test_the_settings_of_a_report_are_accepted() -> None:
    config = PruningConfig(preset="best", penalties=Penalties(beta=2.0), ignore=["down_proj"], pattern="2:4")
    assert PruningConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_where_blocks_leave_the_others_are_fitted_to_the_dense_model() -> None:
    for pattern in ("blocks", {"neurons": 0.2, "blocks": 1}, {"parameters": 0.7}):
        assert PruningConfig(preset="fast", pattern=pattern).target == "model"
        assert PruningConfig(preset="fast", pattern=pattern, target="block").target == "block"
    assert PruningConfig(preset="fast", pattern="neurons").target == "block"


def test_numbers_in_the_help_are_those_of_the_code() -> None:
    shown = " ".join(str(PruningConfig.__doc__).split())
    assert f"continues every {synthetic.PROMPT}-token piece" in shown
    assert f"about {distil.STEP_TOKENS} tokens" in shown
    assert f"first {100 * (1 - distil.OWN_SHARE):.0f} %" in shown


def test_what_patterns_without_sparsity_ask_for() -> None:
    """Of several shares the largest, of a number of blocks all, of a budget what does not stay."""
    for pattern, share in (
        ({"neurons": 0.25, "heads": 0.5, "blocks": 0}, 0.5),
        ({"blocks": 3}, 1),
        ({"latency": 0.7}, 0.3),
    ):
        assert PruningConfig(pattern=pattern).requested_sparsity == pytest.approx(share)
    with pytest.raises(UserError, match=r"keep some of 128 hidden units and remove some, but .* keep 128"):
        PruningConfig(pattern="neurons", sparsity=0.1).kept("neurons", 128)


def test_the_default_preset_is_balanced() -> None:
    assert PruningConfig() == PruningConfig(preset="balanced")
    assert PruningConfig() != PruningConfig(preset="best")
    assert SparseLLMCallback().config == PruningConfig()


DECIDED = {
    "paper": ("sparsellm", "sparsegpt", 4, "block", "uniform", 0, 0, 0, 0.01),
    "fast": ("sparsegpt", "sparsegpt", 4, "block", "uniform", 6, 0, 0, 0.1),
    "balanced": ("admm", "sparsegpt", 4, "model", "kl_blocks", 24, 40, 0, 0.3),
    "best": ("admm", "sparsegpt", 4, "model", "kl", 128, 128, 2, 0.3),
}
"""Of which recipes/RESULTS.md says how they were measured."""


@pytest.mark.parametrize("preset", DECIDED)
def test_presets_are_those_that_were_measured(preset: Any) -> None:
    names = "method local_solver num_iterations target allocation reconstruction_steps distillation_steps continuations damping"
    assert decided(PruningConfig(preset=preset, **FEW)) == dict(zip(names.split(), DECIDED[preset], strict=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", GIVEN)
def test_a_given_setting_wins_over_the_preset(preset: Any, name: str) -> None:
    config = PruningConfig(preset=preset, **{name: GIVEN[name]}, **FEW)
    assert decided(config) == {**PRESETS[preset], name: GIVEN[name]}


@pytest.mark.parametrize("preset", PRESETS)
def test_all_given_settings_win_over_the_preset(preset: Any) -> None:
    assert decided(PruningConfig(preset=preset, **GIVEN)) == GIVEN
    # A given value wins also where it is another preset's value, such as 0.
    assert decided(PruningConfig(preset=preset, **PRESETS["paper"])) == PRESETS["paper"]


@pytest.mark.parametrize(("preset", "method"), [("balanced", "sparsegpt"), ("best", "wanda")])
def test_the_target_is_block_if_no_part_of_the_method_fits_it(preset: Any, method: Any) -> None:
    config = PruningConfig(preset=preset, method=method, reconstruction_steps=0)
    assert (config.target, config.fits_target) == ("block", False)
    alternating = PruningConfig(preset=preset, method="sparsellm", reconstruction_steps=0)
    assert (alternating.target, alternating.fits_target) == ("model", True)


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda", "magnitude"])
def test_a_given_target_model_needs_a_method_that_fits_it(method: Any) -> None:
    with pytest.raises(UserError, match=f"target model needs .*method is {method} without reconstruction"):
        PruningConfig(method=method, reconstruction_steps=0, target="model")
    assert PruningConfig(method=method, reconstruction_steps=1, target="model").target == "model"


@pytest.mark.parametrize(
    "settings", [{"num_iterations": 1}, {"alternation_blocks": "none"}, {"alternation_blocks": []}]
)
def test_a_given_target_model_needs_an_alternation(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="without reconstruction and without an alternation"):
        PruningConfig(preset="paper", target="model", **settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_nofm_patterns_have_a_uniform_allocation(preset: Any) -> None:
    assert decided(PruningConfig(preset=preset, pattern="2:4", **FEW)) == {**PRESETS[preset], "allocation": "uniform"}
    with pytest.raises(UserError, match=r"allocation kl needs pattern unstructured.*pattern 2:4"):
        PruningConfig(preset=preset, pattern="2:4", allocation="kl")


# -- Single settings --------------------------------------------------------------------------------------------------


def test_the_number_of_settings_is_at_most_22() -> None:
    assert len(fields(PruningConfig)) <= 22


def test_defaults_of_settings_that_no_preset_decides() -> None:
    config = PruningConfig()
    assert (config.sparsity, config.requested_sparsity, config.pattern) == (None, 0.5, "unstructured")
    assert (config.alternation_blocks, config.ignore, config.allocation_spread) == ("all", (), 0.15)
    assert config.penalties == Penalties(alpha=1.0, beta=10.0, gamma=1.0, scale_free=True)
    assert (config.num_calibration_samples, config.calibration_val_fraction, config.seed) == (128, 0.125, 0)
    assert (config.solver_precision, config.memory) == ("auto", "auto")


INTEGERS_FROM_1 = ("num_iterations", "num_calibration_samples", "memory")
INTEGERS_FROM_0 = ("reconstruction_steps", "distillation_steps", "continuations")
REFUSED: list[tuple[str, Any]] = [
    *(("sparsity", value) for value in (-0.1, 1, 1.0, 70, NAN, INF)),
    *(("pattern", value) for value in ("4:2", "2:2", "0:4", "-1:4", "2:4:8", "2:", ":4", " 2:4", "2:4\n", "2/4", "")),
    ("pattern", 24),
    *(("preset", value) for value in ("good", "Best", "", 1, None)),
    *(("method", value) for value in ("obs", "SparseGPT", "", 1)),
    *(("local_solver", value) for value in ("sparsellm", "alps", 1)),
    *(("target", value) for value in ("layer", "", 1)),
    *(("allocation", value) for value in ("error", "", 1)),
    *(("solver_precision", value) for value in ("bfloat16", "", None)),
    *(("alternation_blocks", value) for value in ("half", "0", "")),
    *((name, value) for name in INTEGERS_FROM_1 for value in (0, -3, 2.5, True, "many")),
    *((name, value) for name in INTEGERS_FROM_0 for value in (-1, 2.5, True, "many")),
    *(("damping", value) for value in (-0.01, INF, NAN)),
    *(("allocation_spread", value) for value in (-0.1, 1.1, NAN)),
    *(("calibration_val_fraction", value) for value in (-0.1, 0.6, NAN)),
    ("ignore", "down_proj"),
]


@pytest.mark.parametrize("through", [PruningConfig, SparseLLMCallback])
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused(through: Any, name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        through(**{name: value})
    rule, found = str(caught.value).split("got", 1)
    assert name in rule
    assert (repr(value) if isinstance(value, str) else str(value)) in found


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("value", [0, -0.25, INF, NAN])
def test_refused_penalties(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"penalties\.{name} must be positive and finite, got {value}\."):
        PruningConfig(penalties=Penalties(**{name: value}))


ACCEPTED: list[tuple[str, Any]] = [
    *(("sparsity", value) for value in (None, 0, 0.0, 0.999)),
    *(("pattern", value) for value in ("unstructured", "2:4", "1:8")),
    *(("method", value) for value in ("sparsellm", "admm", "sparsegpt", "wanda", "magnitude")),
    *(("local_solver", value) for value in ("admm", "sparsegpt", "wanda", "magnitude")),
    *(("target", value) for value in ("block", "model")),
    *(("allocation", value) for value in ("uniform", "owl", "atp", "kl", "kl_blocks")),
    *(("solver_precision", value) for value in ("auto", "float32")),
    *(("alternation_blocks", value) for value in ("all", "none", "first_half", [], [0, -1])),
    *((name, 1) for name in INTEGERS_FROM_1),
    *((name, 0) for name in INTEGERS_FROM_0),
    ("memory", "auto"),
    ("penalties", Penalties(alpha=1e-6, beta=1e-6, gamma=1e-6)),
    *((name, 0) for name in ("damping", "allocation_spread", "calibration_val_fraction")),
    ("allocation_spread", 1),
    ("calibration_val_fraction", 0.5),
    ("ignore", ()),
]


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_accepted(name: str, value: Any) -> None:
    # Preset paper accepts target block without a fallback.
    assert getattr(PruningConfig(preset="paper", **{name: value}), name) == value


def test_ignored_names_become_a_tuple() -> None:
    assert PruningConfig(ignore=["down_proj", "layers.0.*"]).ignore == ("down_proj", "layers.0.*")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"preset": "paper"}, 0.25),
        ({"preset": "paper", "num_iterations": 1}, 0.0),
        ({"preset": "paper", "alternation_blocks": "none"}, 0.0),
        ({"preset": "paper", "alternation_blocks": []}, 0.0),
        ({"preset": "paper", "num_iterations": 1, "reconstruction_steps": 1}, 0.25),
        ({"preset": "paper", "alternation_blocks": [0]}, 0.25),
        ({"preset": "paper", "method": "sparsegpt"}, 0.0),
        ({"preset": "paper", "method": "sparsegpt", "reconstruction_steps": 2}, 0.25),
        ({"preset": "paper", "method": "sparsegpt", "distillation_steps": 2}, 0.25),
        ({"preset": "paper", "pattern": "neurons"}, 0.25),
        ({"preset": "paper", "pattern": "heads"}, 0.0),  # which leave without the alternation
        ({"preset": "balanced"}, 0.25),
    ],
)
def test_windows_are_held_out_if_the_method_chooses_something_on_them(
    settings: dict[str, Any], expected: float
) -> None:
    assert PruningConfig(calibration_val_fraction=0.25, **settings).held_out_fraction == expected


# -- Patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75), ("2:3", 1 / 3)])
def test_nofm_fixes_the_sparsity(pattern: str, sparsity: float) -> None:
    kept, group = map(int, pattern.split(":"))
    for config in (PruningConfig(pattern=pattern), PruningConfig(pattern=pattern, sparsity=sparsity)):
        assert config.requested_sparsity == pytest.approx(sparsity)
        assert config.group == group
        assert config.build_pattern() == config.build_pattern(sparsity=0.9) == NofM(kept, group)
    with pytest.raises(UserError, match=rf"pattern {pattern} fixes the sparsity at 0\.\d+, got sparsity 0\.62\."):
        PruningConfig(pattern=pattern, sparsity=0.62)


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.7])
def test_unstructured_pattern(sparsity: float | None) -> None:
    config, ranks = PruningConfig(sparsity=sparsity), Ranks()
    expected = 0.5 if sparsity is None else sparsity
    assert (config.requested_sparsity, config.group) == (expected, 1)
    pattern = config.build_pattern(12, ranks)
    assert isinstance(pattern, Unstructured)
    assert (pattern.sparsity, pattern.rows) == (expected, 12)
    assert pattern.ranks is ranks
    assert config.build_pattern() == Unstructured(expected, SINGLE)
    assert config.build_pattern(sparsity=0.9) == Unstructured(0.9, SINGLE)


# -- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "count", "expected"),
    [
        ("all", 5, {0, 1, 2, 3, 4}),
        ("none", 5, set()),
        ("first_half", 6, {0, 1, 2}),
        ("first_half", 5, {0, 1}),
        ("first_half", 1, set()),
        ([], 5, set()),
        ([0, 3], 5, {0, 3}),
        ([-1, -5], 5, {4, 0}),
        ([2, 2, -3], 5, {2}),
    ],
)
def test_alternates_in(blocks: Any, count: int, expected: set[int]) -> None:
    assert PruningConfig(preset="paper", alternation_blocks=blocks).alternates_in(count) == expected
    assert PruningConfig(preset="paper", alternation_blocks=blocks, method="sparsegpt").alternates_in(count) == set()


@pytest.mark.parametrize(("blocks", "outside"), [([5], "[5]"), ([0, -6, 4], "[-6]"), ([7, 1, 9], "[7, 9]")])
def test_blocks_outside_the_model_are_refused(blocks: list[int], outside: str) -> None:
    with pytest.raises(UserError, match="has 5") as caught:
        PruningConfig(preset="paper", alternation_blocks=blocks).alternates_in(5)
    assert outside in str(caught.value)


# -- Command line -----------------------------------------------------------------------------------------------------

ARGUMENTS = ["prune", "--model.pretrained=none", "--trainer.accelerator=cpu", "--trainer.logger=false"]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("", {}),
        ("--pruner.preset best", {"preset": "best"}),
        (
            "--pruner.reconstruction_steps 8 --pruner.preset paper --pruner.method sparsegpt",
            {"preset": "paper", "method": "sparsegpt", "reconstruction_steps": 8},
        ),
        ("--pruner.reconstruction_steps 0", {"reconstruction_steps": 0}),
        (
            "--pruner.penalties.beta 2 --pruner.penalties.scale_free false",
            {"penalties": Penalties(beta=2.0, scale_free=False)},
        ),
        (
            "--pruner.alternation_blocks [0,-1] --pruner.ignore [down_proj] --pruner.memory 1000",
            {"alternation_blocks": [0, -1], "ignore": ["down_proj"], "memory": 1000},
        ),
    ],
)
def test_command_line(arguments: str, settings: dict[str, Any]) -> None:
    assert pruner_of(instantiate(*ARGUMENTS, *arguments.split())).config == PruningConfig(**settings)


def test_configuration_files(tmp_path: Path) -> None:
    """They stack, later ones win, and the command line wins over all."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "pruner: {preset: best, sparsity: 0.6, reconstruction_steps: 5, alternation_blocks: first_half, "
        "penalties: {alpha: 0.5}}\n"
    )
    second.write_text("pruner: {sparsity: 0.7, reconstruction_steps: 7}\n")
    files = ("--config", first, "--config", second)
    config = pruner_of(instantiate(*ARGUMENTS, *files, "--pruner.reconstruction_steps", "6")).config
    expected: dict[str, Any] = {"alternation_blocks": "first_half", "penalties": Penalties(alpha=0.5)}
    assert config == PruningConfig(preset="best", sparsity=0.7, reconstruction_steps=6, **expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--pruner.preset good", "pruner.preset"),
        ("--pruner.reconstruction_steps -1", "reconstruction_steps must be an integer of at least 0, got -1"),
    ],
)
def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], arguments: str, named: str) -> None:
    """jsonargparse refuses wrong types. The settings refuse other wrong values. Both print a message."""
    with pytest.raises(SystemExit) as caught:
        main([*ARGUMENTS, *arguments.split()])
    assert caught.value.code
    assert named in capsys.readouterr().err


def test_numbers_of_other_kinds_become_pythons() -> None:
    """The report and the model card are JSON and YAML."""
    config = PruningConfig(alternation_blocks=range(2), seed=np.int64(3))  # type: ignore[arg-type]
    assert config.alternation_blocks == [0, 1]
    assert type(config.seed) is int
    with pytest.raises(UserError, match=r"alternation_blocks must be an integer, got 1\.5"):
        PruningConfig(alternation_blocks=[1.5])  # type: ignore[list-item]
    assert PruningConfig(num_calibration_samples=np.int64(8), memory=np.int32(9)).memory == 9  # type: ignore[arg-type]
    assert (
        PruningConfig(preset="best", method="sparsellm", reconstruction_steps=0, alternation_blocks=()).target
        == "block"
    )  # type: ignore[arg-type]
    for name in ("num_calibration_samples", "round_to"):
        with pytest.raises(UserError, match=f"{name} must be an integer of at least 1, got None"):
            PruningConfig(**{name: None})
    with pytest.raises(UserError, match="num_iterations must be an integer of at least 1, got 'many'"):
        PruningConfig(preset="paper", num_iterations="many")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"alternation_blocks must be one of all, .*, got 3"):
        PruningConfig(alternation_blocks=3)  # type: ignore[arg-type]
    pattern = PruningConfig(pattern={"neurons": np.float32(0.25), "blocks": np.int64(1)}).pattern  # type: ignore[dict-item]
    assert pattern == {"neurons": 0.25, "blocks": 1}
    assert [type(share) for share in pattern.values()] == [float, int]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="pattern's blocks must be a share below 1 or a number of blocks, got True"):
        PruningConfig(pattern={"blocks": True})
    with pytest.raises(UserError, match="scale_free must be true or false, got 'false'"):
        PruningConfig(penalties={"scale_free": "false"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="penalties' names must be one of alpha, beta, gamma, scale_free, got 'betta'"):
        PruningConfig(penalties={"betta": 2.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed must be an integer, got None"):
        PruningConfig(seed=None)  # type: ignore[arg-type]
