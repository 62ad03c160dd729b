"""The command line, and the command lines of the recipes."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from support.cli import RECIPES, ROOT, instantiate, pruner_of, sparsellm, sparsellm_process

from sparsellm_lightning import SparseFinetuning, UserError, verify_export
from sparsellm_lightning.cli import PruningTrainer, SaveConfigBesideLogs, main
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.shorthand import expanded

TEXT = ("--data.sequence_length", 64, "--data.max_eval_windows", 2)


@pytest.fixture
def config(tmp_path: Path, model_dir: Path) -> Path:
    (tmp_path / "config.yaml").write_text(
        f"""
model: {{pretrained: {model_dir}}}
data: {{source: python-docs, sequence_length: 64, batch_size: 8, max_eval_windows: 8}}
pruner: {{preset: paper, sparsity: 0.6, num_calibration_samples: 16, num_iterations: 2}}
trainer: {{accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false}}
"""
    )
    return tmp_path / "config.yaml"


def test_tasks_of_evaluate(tmp_path: Path, config: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval itself has tests of its own."""
    asked: list[tuple[object, ...]] = []
    harness = SimpleNamespace(
        find_tasks=lambda tasks, folder: folder,
        evaluate_tasks=lambda model, tokenizer, *options: asked.append((tokenizer.name_or_path, *options)) or {},
        task_rows=lambda found: [tuple(found)],
        save_tasks=lambda folder, found, limit: folder,
    )
    monkeypatch.setattr("sparsellm_lightning.cli._harness", lambda trainer: harness)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    options = ("--tasks", "[t]", "--tasks_folder", tmp_path, "--tasks_limit", 5, "--against", other)
    run = sparsellm("evaluate", "--config", config, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert asked == [(str(name), ["t"], str(tmp_path), 5) for name in (model_dir, other)]
    assert f"{model_dir}  {other}" in run.stdout
    for wrong, message in (
        (("--tasks", "[t]", "--against", model_dir), "against must be another model"),
        (("--tasks_limit", 5), "belong to tasks"),
        (("--against", other), "belong to tasks"),
        (("--tasks", "[t]", "--against", tmp_path / "no such model"), "no such model"),
    ):
        run = sparsellm("evaluate", "--config", config, *wrong, cwd=tmp_path)
        assert message in run.stderr


def test_prune_then_evaluate(tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    run = sparsellm("prune", "--config", config, "--pruner.sparsity", "0.7", "--pruner.export_dir", out, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((out / "pruning_report.json").read_text())
    assert report["sparsity"]["requested"] == 0.7
    assert f"{report['perplexity']['dense']:.2f}" in run.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out"], "only the export folder is written"
    assert f"{report['perplexity']['pruned']:.2f}" in run.stdout
    assert set(report["phases"]) == {"forward", "statistics", "local_solve", "alternation", "evaluation", "export"}
    assert all(phase in run.stdout for phase in report["phases"])

    run = sparsellm("evaluate", "--config", config, "--model.pretrained", out, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert f"{report['perplexity']['pruned']:.2f}" in run.stdout
    assert f"{100 * report['sparsity']['achieved']:.2f} %" in run.stdout

    again = tmp_path / "again"
    run = sparsellm(
        *("fit", "--config", config, "--model.weights", out, "--pruner.export_dir", again, "--trainer.max_steps", 2),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((again / "pruning_report.json").read_text())
    assert f"{report['perplexity']['finetuned']:.2f}" in run.stdout
    assert report["sparsity"]["achieved"] == pytest.approx(0.7, abs=0.002)
    assert "phase" not in run.stdout, run.stdout


def test_output_holds_results_alone(tmp_path: Path, model_dir: Path) -> None:
    """No advertisement, no table of operations, no deprecation of others. The default text is named."""
    settings = ("--pruner.preset", "paper", "--pruner.method", "wanda", "--pruner.num_calibration_samples", 4)
    run = sparsellm_process("prune", model_dir, *settings, *TEXT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    output = run.stdout + run.stderr
    assert not re.search("Tip|FLOPs|deprecat|tensorboard|litlogger|Trainable params|max_epochs", output), output
    assert "python-docs, the text inside Python" in run.stdout
    assert "calibration: 4 windows of python-docs, train split" in run.stdout
    assert "Pruning: block 1 of 3" in run.stderr
    assert run.stderr.count("Measuring perplexity: done") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_trial_run_says_that_nothing_was_written(tmp_path: Path, model_dir: Path) -> None:
    settings = ("--pruner.preset", "paper", "--pruner.method", "wanda", "--pruner.num_calibration_samples", 4)
    run = sparsellm("prune", model_dir, *settings, *TEXT, "--trainer.fast_dev_run", "true", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "because trainer.fast_dev_run is set" in run.stdout
    assert not (tmp_path / "outputs").exists()


def test_no_perplexity_is_asked_for(tmp_path: Path, model_dir: Path) -> None:
    run = sparsellm("evaluate", model_dir, *TEXT, "--trainer.limit_test_batches", 0, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1].split()[-1] == "-"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(tmp_path: Path, model_dir: Path, strategy: str) -> None:
    """Lightning starts the command once more for the second rank. Both agree on the default folder."""
    settings = ("--pruner.preset", "paper", "--pruner.method", "wanda", "--pruner.num_calibration_samples", 4)
    devices = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", strategy)
    run = sparsellm_process("prune", model_dir, *settings, *devices, *TEXT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert verify_export(folder) == []
    assert len(re.findall(r"^\S+ +dense", run.stdout, re.MULTILINE)) == 1, "the first rank alone prints"


def test_fit_without_a_limit_trains_one_epoch(tmp_path: Path, model_dir: Path) -> None:
    settings = ("--pruner.preset", "paper", "--pruner.method", "wanda", "--pruner.num_calibration_samples", 4)
    text = (*TEXT, "--data.max_train_windows", 4, "--data.batch_size", 2)
    run = sparsellm("fit", model_dir, *settings, *text, "--pruner.finetune", "true", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt").is_file()
    assert "epoch=0-step=2.ckpt" in run.stdout, "the end says where the result is"
    assert "pruner.export_dir" in run.stdout


@pytest.mark.parametrize("least", [{"min_epochs": 3}, {"min_steps": 3}])
def test_a_minimum_is_no_limit(least: dict[str, int]) -> None:
    assert PruningTrainer(logger=False).max_epochs == 1
    assert (PruningTrainer(logger=False, **least).max_epochs or 1000) > 3


@pytest.mark.parametrize(("folder", "saved"), [("logs/version_0", True), (None, False)])
def test_the_configuration_is_saved_in_the_folder_of_a_run(folder: str | None, saved: bool) -> None:
    """Not in the working directory, where loggers without such a folder write: the user's own file may be there."""
    trainer: Any = SimpleNamespace(loggers=[SimpleNamespace(log_dir=folder)])
    save: Any = SaveConfigBesideLogs.__new__(SaveConfigBesideLogs)
    with mock.patch("lightning.pytorch.cli.SaveConfigCallback.setup") as setup:
        save.setup(trainer, None, "fit")
    assert setup.called == saved


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--model.pretrained", "no-such-model", "--ckpt_path", "typo.ckpt"])
    assert end.value.code == 1
    assert "ckpt_path must be a checkpoint, but there is no typo.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(50), None])
def test_what_is_no_checkpoint(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "last.ckpt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.pretrained", "no-such-model", "--ckpt_path", str(path)])
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "ckpt_path must be a checkpoint" in line


def test_the_model_behind_the_command_wins(config: Path) -> None:
    made = instantiate(*expanded(["prune", "my/model", "--config", str(config)]))
    assert made.model.pretrained == "my/model"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_adapters_are_masked_in_evaluations(command: str) -> None:
    """By the callback, whose tests show it."""
    made = instantiate(command, "--model.pretrained", "my/model")
    getattr(made, f"before_{command}")()
    assert any(isinstance(callback, SparseFinetuning) for callback in made.trainer.callbacks)


def test_prune_refuses_weights(
    config: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["prune", "--config", str(config), "--model.weights", str(model_dir)])
    assert end.value.code == 1
    assert "'prune' prunes model.pretrained, but model.weights names" in capsys.readouterr().err


def test_evaluate_needs_no_prunable_model(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def refuse(*args: object) -> None:
        raise UserError("Blocks must be somewhere.")

    monkeypatch.setattr(StrategyAdapter, "describe", refuse)
    run = sparsellm("evaluate", model_dir, *TEXT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    (row,) = (line for line in run.stdout.splitlines() if str(model_dir) in line)
    assert "unknown" in row
    assert float(row.split()[-1]) > 1
    assert any("Blocks must be somewhere" in str(warning.message) for warning in recwarn)


@pytest.mark.slow
def test_completion(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    run = sparsellm("--print_completion", "shtab-bash", cwd=tmp_path)
    assert run.returncode == 0
    (tmp_path / "completion.sh").write_text(run.stdout)
    asked = "source ./completion.sh; COMP_WORDS=(sparsellm prune --pruner.spar); COMP_CWORD=2; "
    asked += '_shtab_sparsellm sparsellm --pruner.spar prune; echo "${COMPREPLY[@]}"'
    shown = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["--pruner.sparsity"]


def test_fit_from_files(tmp_path: Path, config: Path) -> None:
    text = "In the beginning the programmer wrote a loop, and the loop ran. " * 400
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": text[:3000]}) for _ in range(3)))
    out = tmp_path / "out"
    run = sparsellm(
        *("fit", "--config", config, "--data.source", "files", "--data.train_files", tmp_path / "train.txt"),
        *("--data.test_files", tmp_path / "test.jsonl", "--pruner.finetune", "true", "--pruner.export_dir", out),
        *("--trainer.max_steps", 4, "--model.optimizer", "AdamW", "--model.optimizer.lr", "1e-3"),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((out / "pruning_report.json").read_text())
    assert report["perplexity"]["finetuned"] < report["perplexity"]["pruned"]
    assert all(f"{value:.2f}" in run.stdout for value in report["perplexity"].values())
    assert report["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.002)


@pytest.mark.parametrize("command", ["evaluate", "test", "prune", "fit"])
def test_under_slurm_a_left_checkpoint_is_refused(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Lightning would load the checkpoint that it has left in the working folder when an earlier job was requeued."""
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    options = ("--pruner.finetune", "true") if command == "fit" else ()
    run = sparsellm(command, "--model.pretrained", model_dir, *TEXT, *options, cwd=tmp_path)
    assert run.returncode == 1
    assert "hpc_ckpt_1.ckpt, which a requeued job left" in run.stderr
    if command == "fit":
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with pytest.raises(EOFError):  # this job is the one that goes on, from the empty file
            sparsellm(command, "--model.pretrained", model_dir, *TEXT, *options, cwd=tmp_path)


@pytest.mark.parametrize("options", [[], ["--pruner.finetune", "true"]])
def test_fit_that_would_keep_nothing(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    """Without checkpoints also a model that was trained would be lost."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), *options])
    assert end.value.code == 1
    assert "'fit' must keep its model" in capsys.readouterr().err


def test_a_pattern_that_yaml_reads_as_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("pruner:\n  pattern: 2:4\n")
    with pytest.raises(SystemExit) as end:
        main(["prune", "--config", str(tmp_path / "config.yaml")])
    assert end.value.code == 2
    assert "got 124. Put it in quotes." in capsys.readouterr().err


def test_fit_that_keeps_a_checkpoint(config: Path, tmp_path: Path) -> None:
    saving = "{class_path: ModelCheckpoint, init_args: {dirpath: checkpoints, save_last: true}}"
    options = ("--trainer.callbacks", f"[{saving}]", "--trainer.enable_checkpointing", "true")
    run = sparsellm("fit", "--config", config, *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruner.pattern", "4:2", "--pruner.sparsity", "null"], "kept:group"),
        (["--model.pretrained", "./nowhere"], "does not exist"),
        (["--data.sequence_length", "1000000"], "1000000"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path: Path, config: Path, arguments: list[str], message: str) -> None:
    run = sparsellm("prune", "--config", config, *arguments, cwd=tmp_path)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_help_names_the_commands(tmp_path: Path) -> None:
    """In a process of its own, as a user runs the command."""
    run = sparsellm_process("--help", cwd=tmp_path)
    assert run.returncode == 0
    for line in ("prune a model, measure it before and after", "perplexity and sparsity of any"):
        assert line in " ".join(run.stdout.split())


def test_help_names_the_settings(tmp_path: Path) -> None:
    """The callback takes the fields of ``PruningConfig`` as ``**settings``. The command line resolves them with their help."""
    run = sparsellm("prune", "--help", cwd=tmp_path)
    assert run.returncode == 0
    shown = " ".join(run.stdout.split())
    assert "--pruner.reconstruction_steps RECONSTRUCTION_STEPS Adam steps that tune each block" in shown
    for name in ("sparsity", "preset", "penalties.beta", "ignore", "finetune", "export_dir"):
        assert f"--pruner.{name}" in shown


def commands(recipe: Path) -> list[list[str]]:
    """The ``sparsellm`` command lines in a recipe's leading comment, split into arguments."""
    leading = re.match(r"(?:#.*\n)*", recipe.read_text())
    assert leading is not None
    joined = re.sub(r"\\\n#\s*", " ", leading[0])  # a backslash continues a command in the next line
    return [shlex.split(line) for line in re.findall(r"^#\s{2,}sparsellm (.*)$", joined, re.MULTILINE)]


def config_files(command: list[str]) -> list[Path]:
    return [ROOT / value for name, value in pairwise(command) if name == "--config"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipes_instantiate(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that a recipe's leading comment names parse, from the repository's root, and make their objects."""
    found = commands(recipe)
    assert found, "the leading comment has the command"
    assert recipe in config_files(found[0]), "the first command uses this recipe"
    monkeypatch.chdir(tmp_path)
    for command in found:
        arguments = [str(ROOT / word) if word.startswith("recipes/") else word for word in command]
        made = instantiate(*arguments, "--trainer.accelerator", "cpu")
        if command[0] != "evaluate":
            pruner_of(made)
    keys = [line for line in recipe.read_text().splitlines() if line.startswith(" ")]
    assert all("#" in line or line.endswith(":") for line in keys), "every key with a value is explained"


def test_the_classifier_recipe(model_dir: Path) -> None:
    """A module that is not ``CausalLM`` is pruned to the given sparsity, and learns."""
    recipe = runpy.run_path(str(RECIPES / "finetune" / "classifier.py"))
    measured = recipe["main"](["--pretrained", str(model_dir), "--steps", "120", "--learning-rate", "2e-3"])
    assert measured["sparsity"] == pytest.approx(0.7, abs=0.002)
    assert measured["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("experiment", "rows"),
    [
        ("omega", 4),
        ("convergence", 16),
        ("noise", 32),
        ("activations", 3),
        pytest.param("sparsity", 10, marks=pytest.mark.slow),
        pytest.param("patterns", 10, marks=pytest.mark.slow),
        pytest.param("samples", 6, marks=pytest.mark.slow),
    ],
)
def test_the_experiments(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], experiment: str, rows: int
) -> None:
    recipe = runpy.run_path(str(RECIPES / "experiments.py"))
    small = ("--pretrained", str(model_dir), "--length", "64", "--windows", "8", "--out", str(tmp_path))
    found = recipe["main"]([experiment, *small])
    assert len(found) == rows
    assert {path.name for path in tmp_path.iterdir()} - {"perplexities.json"} == {
        f"{experiment}.csv",
        f"{experiment}.png",
    }
    header, *_ = table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len({line for line, _, _ in found}), "a row for each line of the plot"
    assert len(header) == 1 + len({place for _, place, _ in found}), "a column for each place"
    assert table[-1][-1].rstrip(" |") == f"{found[-1][2]:.4g}"
    values = [value for _, _, value in found]
    if experiment in ("convergence", "noise"):
        assert all(value == 1 for _, iteration, value in found if iteration == 0)
        assert all(value < 1 for _, iteration, value in found if iteration == 1), "in every block, with noise too"
        means = {value for line, iteration, value in found if iteration == 1 and "mean" in line}
        assert len(means) == (4 if experiment == "noise" else 1), "the noise is applied"
    elif experiment == "activations":
        assert {line for line, _, _ in found} == {"relu", "gelu", "silu"}
        assert all(0 < value <= 1 for value in values)
    else:
        assert len(set(values)) == len(values), "every run differs"


@pytest.mark.slow
def test_the_card_repeats_the_run(model_dir: Path, tmp_path: Path) -> None:
    text = ("--data.sequence_length", 64, "--data.max_eval_windows", 2, "--data.seed", 3)
    settings = ("--pruner.preset", "paper", "--pruner.sparsity", 0.6, "--pruner.num_calibration_samples", 4)
    run = sparsellm("prune", model_dir, *text, *settings, "--pruner.export_dir", "first", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    config = (tmp_path / "first" / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "again.yaml").write_text(config)
    run = sparsellm("prune", "--config", "again.yaml", "--pruner.export_dir", "second", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    reports = [json.loads((tmp_path / name / "pruning_report.json").read_text()) for name in ("first", "second")]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]


def test_an_unknown_strategy(model_dir: Path, tmp_path: Path) -> None:
    run = sparsellm("prune", "--model.pretrained", model_dir, "--trainer.strategy", "nonsense", cwd=tmp_path)
    assert run.returncode == 1
    assert "sparsellm: error: The Trainer must accept its settings" in run.stderr
    assert "nonsense" in run.stderr
