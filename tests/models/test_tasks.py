"""Accuracy on a small local task, against likelihoods computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from support.cli import sparsellm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsellm_lightning.models import load_model, load_tokenizer
from sparsellm_lightning.models.tasks import LESS, evaluate_tasks, find_tasks, save_tasks, task_rows

QUESTIONS = [
    ("The assert", ["statement", "zebra"], 0),
    ("The for", ["statement is", "loops zzz"], 1),
    ("In the", ["following", "qqqq"], 1),
    ("A class", ["definition", "x x x x"], 0),
    ("Use the", ["name", "print"], 1),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    (tmp_path / "local.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "local.jsonl"}, cache_dir: {tmp_path / "cache"}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return tmp_path


def accuracy_by_hand(model_dir: Path) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
            with torch.no_grad():
                likelihoods = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            scores.append(float(likelihoods[start - 1 :].sum()))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


def test_accuracy(folder: Path, model_dir: Path) -> None:
    model, tokenizer = load_model(str(model_dir)).eval(), load_tokenizer(str(model_dir))
    found = evaluate_tasks(model, tokenizer, ["local_choice"], find_tasks(["local_choice"], str(folder)))
    assert found == {"local_choice": {"acc": pytest.approx(accuracy_by_hand(model_dir))}}
    assert 0 < found["local_choice"]["acc"] < 1


def test_recovered_share() -> None:
    rows = task_rows({"sparse": {"a": {"acc": 0.3}}, "dense": {"a": {"acc": 0.4}}})
    assert rows == [("task", "metric", "sparse", "dense", "recovered"), ("a", "acc", "0.3000", "0.4000", "75.0 %")]
    name = f"perplexity{LESS}"
    rows = task_rows({"sparse": {"a": {name: 40.0}}, "dense": {"a": {name: 20.0}}})
    assert rows[1] == ("a", name, "40.0000", "20.0000", "-"), "nothing is recovered"


def test_results_beside_the_report(tmp_path: Path) -> None:
    """Few examples are named, a metric that is not a number is null, and a folder that is read-only costs no results."""
    (tmp_path / "pruning_report.json").write_text('{"files": []}')
    save_tasks(tmp_path, {"a": {"t": {"acc": 0.5, "other": math.nan}}}, limit=20)
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written == {"a": {"t": {"acc": 0.5, "other": None}}, "examples of each task": {"a": {"t": 20}}}
    save_tasks(tmp_path, {"a": {"u": {"acc": 0.1}}, "b": {"u": {"acc": 0.2}}})
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written["a"] == {"t": {"acc": 0.5, "other": None}, "u": {"acc": 0.1}}, "earlier tasks stay"
    assert written["b"] == {"u": {"acc": 0.2}}
    assert written["examples of each task"] == {"a": {"t": 20}}, "of another task, and of the model it was measured on"
    save_tasks(tmp_path, {"a": {"t": {"acc": 0.6}}})
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written["a"]["t"] == {"acc": 0.6}
    assert "examples of each task" not in written
    assert json.loads((tmp_path / "pruning_report.json").read_text())["files"] == ["tasks.json"]
    (tmp_path / "tasks.json").unlink()
    (tmp_path / "tasks.json").mkdir()
    with pytest.warns(UserWarning, match="is not written"):
        save_tasks(tmp_path, {})


def test_unknown_tasks_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="must be known to lm_eval, got no_such_task"):
        find_tasks(["local_choice", "no_such_task"], str(folder))


@pytest.mark.slow
def test_command(folder: Path, model_dir: Path) -> None:
    text = ("--data.sequence_length", 64, "--data.max_eval_windows", 2)
    out = folder / "out"
    settings = ("--pruner.preset", "paper", "--pruner.method", "wanda", "--pruner.num_calibration_samples", 4)
    run = sparsellm("prune", model_dir, *text, *settings, "--pruner.export_dir", out, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    tasks = ("--tasks", "[local_choice]", "--tasks_folder", folder, "--against", model_dir)
    run = sparsellm("evaluate", out, *text, *tasks, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "recovered" in run.stdout
    results = json.loads((out / "tasks.json").read_text())
    assert results[str(model_dir)]["local_choice"]["acc"] == pytest.approx(accuracy_by_hand(model_dir))
    # The export knows the file, so it can be replaced.
    run = sparsellm(
        *("prune", model_dir, *text, *settings, "--pruner.export_dir", out, "--pruner.overwrite", "true"), cwd=folder
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert not (out / "tasks.json").exists()
