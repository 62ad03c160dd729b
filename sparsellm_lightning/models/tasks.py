"""Accuracy on tasks, by EleutherAI's ``lm_eval``. Importing this module needs the ``eval`` extra."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.export import REPORT_NAME, add_to_report, replace_text

RESULTS_NAME = "tasks.json"
_LIMITS = "examples of each task"  # entry beside those of the models, by model and task, where they are not all
LESS = " (less is better)"  # behind the names of such metrics, as of perplexity


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics by task, such as ``{"arc_easy": {"acc": 0.61}}``. Those of which less is better have :data:`LESS` behind.

    Args:
        model, tokenizer: to evaluate.
        tasks: names of tasks that the manager knows.
        manager: from :func:`find_tasks`.
        limit: examples of each task. None: all.
    """
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    found: Any = simple_evaluate(
        wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    more = found["higher_is_better"]
    return {
        task: {
            name.removesuffix(",none") + LESS * (more.get(task, {}).get(name.partition(",")[0]) is False): float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and "stderr" not in name and name != "sample_len"
        }
        for task, metrics in found["results"].items()
    }


def find_tasks(tasks: Sequence[str], folder: str | None = None) -> TaskManager:
    """The tasks that ``lm_eval`` and a folder have.

    Raises:
        UserError: one of ``tasks`` is not among them.
    """
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"tasks must be known to lm_eval, got {', '.join(unknown)}. `lm_eval ls tasks` lists them.")
    return manager


def save_tasks(folder: Path, results: dict[str, dict[str, dict[str, float]]], limit: int | None = None) -> Path:
    """Write ``tasks.json`` beside an export's report. Returns its path.

    Args:
        folder: of the export.
        results: by model and task. Metrics that are not finite are written as null.
        limit: examples of each task, written beside them. None: all.

    Earlier results of other models and tasks stay in the file.
    """
    path = folder / RESULTS_NAME
    finite = {
        model: {
            task: {metric: value if math.isfinite(value) else None for metric, value in metrics.items()}
            for task, metrics in tasks.items()
        }
        for model, tasks in results.items()
    }
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    limits = content.pop(_LIMITS, {})
    for model, tasks in finite.items():
        content[model] = {**content.get(model, {}), **tasks}
        others = {task: number for task, number in limits.get(model, {}).items() if task not in tasks}
        limits[model] = others | ({} if limit is None else dict.fromkeys(tasks, limit))
    limits = {model: numbers for model, numbers in limits.items() if numbers}
    content |= {_LIMITS: limits} if limits else {}
    try:
        replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        warnings.warn(f"{path} is not written: {error}", stacklevel=2)
        return path
    files = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))["files"]
    add_to_report(folder, files=sorted({*files, RESULTS_NAME}))
    return path


def task_rows(results: dict[str, dict[str, dict[str, float]]]) -> list[tuple[str, ...]]:
    """A table: task, metric, the value of each model and, of two models and where more is better, the share recovered."""
    names = list(results)
    rows = [("task", "metric", *names, *(["recovered"] if len(names) > 1 else []))]
    for task, metrics in results[names[0]].items():
        for metric, value in metrics.items():
            values = [value, *(results[name][task][metric] for name in names[1:])]
            compared = values[-1] and not metric.endswith(LESS)
            share = [f"{100 * values[0] / values[-1]:.1f} %" if compared else "-"] if len(names) > 1 else []
            rows.append((task, metric, *(f"{value:.4f}" for value in values), *share))
    return rows
