"""Peak memory as the number of globally solved blocks goes 0, 5, 10, 15, 20: SparseLLM beside SparseGPT, on SmolLM2-135M.

python tests/benchmarks/memory_vs_blocks.py [--windows 32] [--iterations 2] [--train-files train.txt] [--json memory.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import model_folder, prune_job, run_job, save_windows, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 5, 10, 15, 20])
    parser.add_argument("--layers", type=int, help="only the first so many blocks, all 30 by default")
    parser.add_argument("--iterations", type=int, default=2, help="memory is the same from two on")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--train-files", nargs="*", default=None, help="text, instead of python-docs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(prune_job(json.loads(options.job))))
        return

    from sparsellm_lightning.report import format_table

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        model = model_folder(base / "model", options.layers)
        windows = save_windows(base / "windows.pt", text(model, options.train_files), options.windows)
        configs: dict[str, dict[str, Any]] = {"sparsegpt": {"method": "sparsegpt"}}
        for blocks in options.blocks:
            chosen = list(range(blocks)) if blocks else "none"
            configs[f"sparsellm, {blocks} blocks"] = {"global_blocks": chosen, "num_iterations": options.iterations}
        for name, config in configs.items():
            figures[name] = run_job(
                __file__, {"model": model, "windows": windows, "config": {"sparsity": 0.7, **config}}
            )
    one = figures["sparsegpt"]["peak_bytes"]
    rows: list[tuple[str, ...]] = [("run", "peak MiB", "of SparseGPT's", "seconds")]
    for name, figure in figures.items():
        peak = figure["peak_bytes"]
        rows.append((name, f"{peak / 2**20:.0f}", f"{peak / one:.3f}", f"{figure['seconds']:.0f}"))
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
