"""Perplexity of SmolLM2-135M without some hidden units or decoder blocks, by this package and by published methods.

    python tests/benchmarks/structured.py --out structured --train-files train.txt --test-files test.txt
        [--cells "balanced, 50 % of units"] [--layers 6] [--windows 32] [--results recipes/RESULTS.md]

Every method sees the same windows and removes equally many units from every block. Written here from their papers, without
fine-tuning: FLAP (arXiv 2312.11983), which ranks a unit by the variance of its activation times ``‖W_d[:, j]‖²`` and puts the
mean of what left into a bias; ShortGPT (arXiv 2403.03853), which ranks a block by the cosine between its input and output. The
package's methods ``wanda`` (Wanda-sp), ``magnitude`` and the presets are its own.

Finished cells are kept in ``structured.json`` by their name and a hash of their settings. ``--results`` writes
the table into a section of that file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import PYTHON_DOCS, TEST_TEXT, Job, complete, parser, prepared, prune_job, score_job, scores, write_section
from torch import Tensor, nn
from transformers import AutoConfig

UNITS = {"25 % of units": 0.25, "50 % of units": 0.5}
DEPTHS = {"3 blocks": 3, "6 blocks": 6}
UNIT_ROWS: dict[str, dict[str, Any]] = {
    "magnitude": {"preset": "paper", "method": "magnitude"},
    "wanda": {"preset": "paper", "method": "wanda"},
    "FLAP": {},
    "sparsegpt": {"preset": "paper", "method": "sparsegpt"},
    "paper": {"preset": "paper"},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "balanced, method=sparsellm": {"preset": "balanced", "method": "sparsellm"},
    "best": {"preset": "best"},
    "fast, distillation_steps=128": {"preset": "fast", "distillation_steps": 128},
}
DEPTH_ROWS: dict[str, dict[str, Any]] = {
    "ShortGPT": {},
    "paper": {"preset": "paper"},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
    "fast, distillation_steps=128": {"preset": "fast", "distillation_steps": 128},
}


def cells(blocks: int) -> dict[str, Job]:
    """What a process has to do for each cell of a model with so many blocks, by ``row, column``."""
    found: dict[str, Job] = {"dense": {}}
    for column, share in UNITS.items():
        for row, config in UNIT_ROWS.items():
            settings = {"config": {**config, "pattern": "neurons", "sparsity": share}}
            found[f"{row}, {column}"] = settings if config else {"flap": share}
    for column, count in DEPTHS.items():
        for row, config in DEPTH_ROWS.items() if count < blocks else ():
            settings = {"config": {**config, "pattern": {"blocks": count}}}
            found[f"{row}, {column}"] = settings if config else {"shortgpt": count}
    return found


def answer(job: Job) -> Job:
    if "config" in job:
        return prune_job(job)
    if "flap" in job or "shortgpt" in job:
        return baseline_job(job)
    return score_job(job)


@torch.no_grad()
def baseline_job(job: Job) -> Job:
    """Prune a LLaMA-like model by FLAP or ShortGPT, and evaluate it."""
    from sparsellm_lightning import load_model

    model = load_model(job["model"]).eval()
    windows = torch.load(job["windows"])
    if "flap" in job:
        flap(model, windows, job["flap"])
    else:
        shortgpt(model, windows, job["shortgpt"])
    return scores(model, job["texts"])


def flap(model: Any, windows: Tensor, share: float) -> None:
    """FLAP with equally many units a block, block after block on what the pruned blocks before give."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    first = model.model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
    for batch in windows.split(8):
        model.model(input_ids=batch, use_cache=False)  # a cache would give the dense keys and values again
    hook.remove()
    states = [hidden for hidden, _ in calls]
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        seen: list[Tensor] = []
        hook = down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        for hidden, (_, kwargs) in zip(states, calls, strict=True):
            layer(hidden, **kwargs)
        hook.remove()
        h = torch.cat(seen)
        scores_of_units = h.var(0) * down.weight.square().sum(0)
        gone = scores_of_units.argsort()[: round(share * down.in_features)]
        down.bias = nn.Parameter(down.weight[:, gone] @ h.mean(0)[gone])
        down.weight[:, gone] = 0
        layer.mlp.gate_proj.weight[gone] = 0
        layer.mlp.up_proj.weight[gone] = 0
        states = [layer(hidden, **kwargs) for hidden, (_, kwargs) in zip(states, calls, strict=True)]


def shortgpt(model: Any, windows: Tensor, count: int) -> None:
    """ShortGPT: the blocks whose output is most like their input leave, all at once."""
    # The last of transformers' hidden states may be that behind the final norm.
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    for batch in windows.split(8):
        model.model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    per_batch = len(model.model.layers) + 1
    states = [seen[start : start + per_batch] for start in range(0, len(seen), per_batch)]
    influences = []
    for index in range(len(model.model.layers)):
        cosines = [torch.cosine_similarity(s[index], s[index + 1], dim=-1).flatten() for s in states]
        influences.append(1 - float(torch.cat(cosines).mean()))
    for index in sorted(range(len(influences)), key=influences.__getitem__)[:count]:
        layer = model.model.layers[index]
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.zero_()


def table(known: dict[str, Job], rows: Iterable[str], columns: Iterable[str]) -> str:
    """Perplexities on all texts and the gap on the first, without rows and columns that are not known."""
    dense = known["dense"]["perplexity"]
    texts = list(dense)
    columns = [column for column in columns if any(f"{row}, {column}" in known for row in rows)]
    lines = ["| | " + " | ".join(f"{column}: {' / '.join(texts)} (gap)" for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        found = [known.get(f"{row}, {column}", {}).get("perplexity") for column in columns]
        shown = [
            ""
            if cell is None
            else " / ".join(f"{cell[text]:,.1f}" for text in texts)
            + f" ({math.log(cell[texts[0]] / dense[texts[0]]):.2f})"
            for cell in found
        ]
        if any(shown):
            lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines) if columns else ""


def main() -> None:
    arguments = parser(__doc__, "--model", "--layers", "--windows", "--train-files", "--test-files")
    arguments.add_argument("--out", type=Path, required=True, help="folder of structured.json")
    arguments.add_argument("--cells", nargs="*", help="'row, column' of each; all by default")
    arguments.add_argument("--results", type=Path, help="Markdown file whose section structured is replaced")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts = [TEST_TEXT, PYTHON_DOCS] if options.train_files else [PYTHON_DOCS]
    with prepared(options, texts) as job:
        every = cells(AutoConfig.from_pretrained(job["model"]).num_hidden_layers)
        jobs = {name: {**job, **cell} for name, cell in every.items()}
        known = complete(options.out / "structured.json", jobs, ("dense", *(options.cells or every)), __file__)
    dense = ", ".join(f"{value:.1f} on {name}" for name, value in known["dense"]["perplexity"].items())
    parts = (
        f"### Without units or blocks\n\nDense: {dense}. In brackets: ln(perplexity / dense) on the first text.",
        table(known, UNIT_ROWS, UNITS),
        table(known, DEPTH_ROWS, DEPTHS),
    )
    text = "\n\n".join(part for part in parts if part)
    if options.results:
        write_section(options.results, "structured", text)
    print(text)


if __name__ == "__main__":
    if "--job" in sys.argv:
        print(json.dumps(answer(json.loads(sys.argv[sys.argv.index("--job") + 1]))))
    else:
        main()
