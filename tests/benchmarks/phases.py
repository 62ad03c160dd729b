"""Where the time goes: seconds, TFLOP and share of the GEMM peak by phase, for each method, on SmolLM2-135M.

python tests/benchmarks/phases.py [--layers 6] [--windows 32] [--train-files train.txt] [--json phases.json]
"""

from __future__ import annotations

import json

from common import measure, parser, prepared


def main() -> None:
    arguments = parser(__doc__, "--layers", "--windows", "--train-files", "--json")
    arguments.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "sparsellm"])
    options = arguments.parse_args()

    figures = {}
    with prepared(options) as job:
        for method in options.methods:
            figure = figures[method] = measure(
                {**job, "config": {"preset": "paper", "sparsity": 0.7, "method": method}}
            )
            print(f"{method}: {figure['seconds']:.1f} s, {100 * figure['share']:.0f} % of the GEMM peak")
            print(figure.pop("table"), flush=True)
            print()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
