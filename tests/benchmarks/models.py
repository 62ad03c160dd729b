"""Which causal-LM classes of ``transformers`` can be pruned: a tiny random model of each, by preset `paper`.

python tests/benchmarks/models.py --out recipes/MODELS.md
python tests/benchmarks/models.py --out some.md --types phi3 mixtral
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.classes import causal_lm_types, without_timm
from support.classes_pruned import prune_class

from sparsellm_lightning import UserError

HEADER = """# Models

    python tests/benchmarks/models.py --out recipes/MODELS.md

Every model type that `AutoModelForCausalLM` of transformers {version} knows, as a tiny random model, pruned to 50 % and to 2:4
by preset `paper`. {pruned} of {all} have the exact zeros, and equal logits after export and reload. The last column is
`‖logits − dense logits‖` at 50 % on the calibration windows, divided by magnitude pruning's. Networks (feed-forward, of all
blocks) and experts are solved by the alternation (2:4 by one iteration of it), the other pruned weights layer by layer.

| type | networks | experts | in pruned matrices | error |
|---|---|---|---|---|
"""


def main(args: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="*", choices=causal_lm_types(), default=causal_lm_types())
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows, refused, right = [], [], 0
    for model_type in options.types:
        with tempfile.TemporaryDirectory() as folder, without_timm():
            try:
                pruned = prune_class(model_type, Path(folder))
            except UserError as error:
                refused.append(f"- `{model_type}`: {error}")
                continue
        wrong = "" if not pruned.wrong and pruned.reloaded < 1e-4 else ", **wrong**"
        rows.append(f"| `{model_type}` | {pruned.row}{wrong} |")
        right += not wrong
        print(rows[-1], flush=True)
    header = HEADER.format(version=transformers.__version__, pruned=right, all=len(options.types))
    options.out.write_text(header + "\n".join(rows) + "\n\n## Refused\n\n" + "\n".join(refused) + "\n")


if __name__ == "__main__":
    main()
