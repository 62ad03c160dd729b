"""Peak memory with the alternation in 0, 5, 10, 15 and 20 blocks of SmolLM2-135M, beside SparseGPT.

python tests/benchmarks/memory_vs_blocks.py [--windows 32] [--iterations 2] [--train-files train.txt] [--json memory.json]
"""

from __future__ import annotations

import json
from typing import Any

from common import measure, parser, prepared

from sparsellm_lightning.reporting import format_table


def main() -> None:
    arguments = parser(__doc__, "--layers", "--windows", "--train-files", "--json")
    arguments.add_argument("--blocks", type=int, nargs="+", default=[0, 5, 10, 15, 20])
    arguments.add_argument("--iterations", type=int, default=2, help="memory is the same from two on")
    options = arguments.parse_args()

    configs: dict[str, dict[str, Any]] = {"sparsegpt": {"preset": "paper", "method": "sparsegpt"}}
    for blocks in (number for number in options.blocks if number <= (options.layers or number)):
        chosen = list(range(blocks)) if blocks else "none"
        configs[f"sparsellm, {blocks} blocks"] = {
            "preset": "paper",
            "alternation_blocks": chosen,
            "num_iterations": options.iterations,
        }
    with prepared(options) as job:
        figures = {name: measure({**job, "config": {"sparsity": 0.7, **config}}) for name, config in configs.items()}
    peaks = {name: figure["peak_bytes"] - figure["before_bytes"] for name, figure in figures.items()}
    one = peaks["sparsegpt"]
    rows: list[tuple[str, ...]] = [("run", "peak over the loaded model, MiB", "of SparseGPT's", "seconds")]
    for (name, figure), peak in zip(figures.items(), peaks.values(), strict=True):
        rows.append((name, f"{peak / 2**20:.0f}", f"{peak / one:.3f}", f"{figure['seconds']:.0f}"))
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
