"""Seconds, peak memory and perplexity beside llm-compressor's SparseGPT: SmolLM2-135M at 70 %, the same 32 x 512 windows.

    python tests/benchmarks/vs_llmcompressor.py --train-files train.txt --test-files test.txt [--rounds 3] [--json vs.json]

llm-compressor is installed into a virtual environment of its own, kept in ``--venv`` for the next time. The runs are
interleaved, a process each, on a model in float32; the table shows medians over rounds. Its perplexity is measured here too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from common import model_folder, peak_bytes, prune_job, run_job, save_windows, text

REQUIREMENT = "llmcompressor==0.14.*"
OURS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "sparsellm, 4 iterations": {"method": "sparsellm", "num_iterations": 4},
}
THEIRS = "llm-compressor SparseGPT"


def their_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in the other environment, which does not have this package."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    windows = torch.load(job["windows"])
    before = peak_bytes()
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    recipe = SparseGPTModifier(
        sparsity=0.7,
        mask_structure="0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
        block_size=128,
        dampening_frac=0.01,
    )
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
    if job["out"]:
        # As plain weights: whatever their wrapper would add to the format is not measured.
        torch.save({name: value.detach().clone() for name, value in model.state_dict().items()}, f"{job['out']}.pt")
    return {"seconds": seconds, "peak_bytes": after, "before_bytes": before}


def other_python(folder: Path) -> str:
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", REQUIREMENT], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return str(python)


def measure(model: str, out: str, data: Any) -> float:
    """Perplexity on the test windows of what a run wrote."""
    import torch

    from sparsellm_lightning import load_model, perplexity

    pruned = load_model(out if Path(out).is_dir() else model)
    if not Path(out).is_dir():
        pruned.load_state_dict(torch.load(f"{out}.pt"))
    return perplexity(pruned, data.test_dataloader())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="only the first so many blocks, all 30 by default")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--train-files", nargs="*", default=None, help="text, instead of python-docs")
    parser.add_argument("--test-files", nargs="*", default=None, help="text to evaluate on, with --train-files")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "sparsellm_lightning" / "llmcompressor")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        print(json.dumps(prune_job(job) if "config" in job else their_job(job)))
        return

    from sparsellm_lightning.report import format_table

    python = other_python(options.venv)
    runs: dict[str, list[dict[str, Any]]] = {THEIRS: [], **{name: [] for name in OURS}}
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        model = model_folder(base / "model", options.layers)
        data = text(model, options.train_files, options.test_files)
        job = {"model": model, "windows": save_windows(base / "windows.pt", data, options.windows)}
        for number in range(options.rounds):
            for name, results in runs.items():
                out = str(base / f"{name}-{number}".replace(" ", ""))
                if name == THEIRS:
                    result = run_job(__file__, {**job, "out": out}, python)
                else:
                    result = run_job(__file__, {**job, "out": out, "config": {"sparsity": 0.7, **OURS[name]}})
                results.append({**result, "perplexity": measure(model, out, data)})
                print(name, {k: results[-1][k] for k in ("seconds", "peak_bytes", "perplexity")}, file=sys.stderr)
    median = {
        name: {key: statistics.median(r[key] for r in rs) for key in ("seconds", "peak_bytes", "perplexity")}
        for name, rs in runs.items()
    }
    rows: list[tuple[str, ...]] = [("run", "seconds", "x theirs", "x ours", "peak MiB", "x theirs", "perplexity")]
    for name, m in median.items():
        against_theirs, against_ours = (m["seconds"] / median[other]["seconds"] for other in (THEIRS, "sparsegpt"))
        memory = m["peak_bytes"] / median[THEIRS]["peak_bytes"]
        rows.append(
            (
                *(name, f"{m['seconds']:.1f}", f"{against_theirs:.2f}", f"{against_ours:.2f}"),
                *(f"{m['peak_bytes'] / 2**20:.0f}", f"{memory:.2f}", f"{m['perplexity']:.2f}"),
            )
        )
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps({"median": median, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
