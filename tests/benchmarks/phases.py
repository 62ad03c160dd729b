"""Where the time goes: seconds, TFLOP and share of the GEMM peak by phase, for each method, on SmolLM2-135M.

python tests/benchmarks/phases.py [--layers 6] [--windows 32] [--train-files train.txt] [--json phases.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from common import model_folder, prune_job, run_job, save_windows, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "sparsellm"])
    parser.add_argument("--layers", type=int, help="only the first so many blocks, all 30 by default")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--train-files", nargs="*", default=None, help="text, instead of python-docs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(prune_job(json.loads(options.job))))
        return

    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        model = model_folder(base / "model", options.layers)
        windows = save_windows(base / "windows.pt", text(model, options.train_files), options.windows)
        for method in options.methods:
            job = {"model": model, "windows": windows, "config": {"sparsity": 0.7, "method": method}}
            figures[method] = run_job(__file__, job)
            print(
                f"{method}: {figures[method]['seconds']:.1f} s, {100 * figures[method]['share']:.0f} % of the GEMM peak"
            )
            print(figures[method].pop("table"), flush=True)
            print()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
