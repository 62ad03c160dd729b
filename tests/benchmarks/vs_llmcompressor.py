"""Seconds, peak memory and perplexity beside llm-compressor's SparseGPT: SmolLM2-135M at 70 %, the same 32 x 512 windows.

    python tests/benchmarks/vs_llmcompressor.py --train-files train.txt --test-files test.txt [--rounds 3] [--json vs.json]

llm-compressor is installed into a virtual environment of its own, kept in ``--venv`` for the next time. The runs are
interleaved, a process each, on a model in float32; the table shows medians over rounds. Its perplexity is measured here too.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from common import TEST_TEXT, measure, other_python, parser, prepared

from sparsellm_lightning.reporting import format_table

THEIRS = "llm-compressor SparseGPT"
RUNS: dict[str, dict[str, Any]] = {
    THEIRS: {"modifier": "SparseGPTModifier", "block_size": 128, "dampening_frac": 0.01},
    "sparsegpt": {"preset": "paper", "method": "sparsegpt"},
    "paper": {"preset": "paper"},
}

FIGURES = ("seconds", "added_bytes", "perplexity")


def main() -> None:
    arguments = parser(__doc__, "--layers", "--windows", "--train-files", "--test-files", "--venv", "--json")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()

    python = other_python(options.venv)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with prepared(options, [TEST_TEXT]) as job:
        for _ in range(options.rounds):
            for name, results in runs.items():
                result = measure({**job, "config": {"sparsity": 0.7, **RUNS[name]}}, python)
                added = result["peak_bytes"] - result["before_bytes"]
                results.append({**result, "perplexity": result["perplexity"][TEST_TEXT], "added_bytes": added})
                print(name, {k: results[-1][k] for k in FIGURES}, file=sys.stderr)
    median = {name: {key: statistics.median(r[key] for r in rs) for key in FIGURES} for name, rs in runs.items()}
    heads = ("seconds", "x theirs", "x ours", "peak over the loaded model, MiB", "x theirs", "perplexity")
    rows: list[tuple[str, ...]] = [("run", *heads)]
    for name, m in median.items():
        against_theirs, against_ours = (m["seconds"] / median[other]["seconds"] for other in (THEIRS, "sparsegpt"))
        memory = m["added_bytes"] / median[THEIRS]["added_bytes"]
        rows.append(
            (
                *(name, f"{m['seconds']:.1f}", f"{against_theirs:.2f}", f"{against_ours:.2f}"),
                *(f"{m['added_bytes'] / 2**20:.0f}", f"{memory:.2f}", f"{m['perplexity']:.2f}"),
            )
        )
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps({"median": median, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
