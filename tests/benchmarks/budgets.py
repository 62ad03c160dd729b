"""Perplexity, size and speed of SmolLM2-135M by budget: smaller dense models, 2:4 and unstructured zeros, also fine-tuned.

A budget of parameters stands beside units alone and blocks alone that keep at most as many.

    python tests/benchmarks/budgets.py --out budgets --train-files train.txt --test-files test.txt
        [--rows "80 % of parameters"] [--tuned "80 % of parameters"] [--steps 150] [--layers 6] [--windows 32]
        [--results recipes/RESULTS.md]

Every row is pruned by preset ``fast`` with 128 distillation steps and exported. Those of ``--tuned`` are then fine-tuned as the
recipe finetune/distilled.yaml does, half of the loss being from the dense model's distributions, but by steps of 1,024 tokens,
at a lower rate, because there is less to repair than at 70 % zeros, with AdamW's own betas, and the embeddings train too. All
exports and the dense model are measured for speed in turn, in one process, as ``sparsellm benchmark`` does.

Perplexities are kept in ``budgets.json`` by row and a hash of its settings, exports in folders beside it.
``--results`` writes the table into a section of that file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import (
    PYTHON_DOCS,
    TEST_TEXT,
    Job,
    complete,
    parser,
    prepared,
    prune_job,
    run_job,
    save_windows,
    score_job,
    scores,
    text,
    write_section,
)
from transformers import AutoConfig

DISTILLED: dict[str, Any] = {"preset": "fast", "distillation_steps": 128}
# Three quarters of the parameters of a block of SmolLM2 are its feed-forward network.
ROWS: dict[str, dict[str, Any]] = {
    "80 % of parameters": {"pattern": {"parameters": 0.8}},
    "80 %, units alone": {"pattern": {"neurons": 0.29}},
    "80 %, blocks alone": {"pattern": {"blocks": 6}},
    "70 % of parameters": {"pattern": {"parameters": 0.7}},
    "70 %, units alone": {"pattern": {"neurons": 0.41}},
    "70 %, blocks alone": {"pattern": {"blocks": 9}},
    "2:4 zeros": {"pattern": "2:4"},
    "50 % zeros": {"sparsity": 0.5},
}
TUNED = [row for row in ROWS if "alone" not in row]
STEP_WINDOWS = 2  # of 512 tokens


def answer(job: Job) -> Job:
    if "names" in job:
        return speed_job(job)
    if "rate" in job:
        return fine_tune_job(job)
    return prune_job(job) if "config" in job else score_job(job)


def fine_tune_job(job: Job) -> Job:
    """Fine-tune the model in ``folder`` on the windows in ``train`` with the dense model as teacher, and evaluate."""
    import lightning as L

    from sparsellm_lightning import CausalLM, Distillation, SparseFinetuning

    windows = torch.load(job["train"])[: job["steps"] * STEP_WINDOWS]
    loader = torch.utils.data.DataLoader([{"input_ids": ids} for ids in windows], batch_size=STEP_WINDOWS)
    module = CausalLM(
        weights=job["folder"],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=job["rate"], weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=job["rate"], total_steps=job["steps"], pct_start=0.1, cycle_momentum=False
        ),
    )
    zeros = [SparseFinetuning()] if "zeros" in job["row"] else []  # the other rows are dense, only smaller
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=job["steps"],
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[*zeros, Distillation(job["model"], task_weight=0.5, logit_weight=0.5)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    return scores(module.model.eval(), job["texts"])


def speed_job(job: Job) -> Job:
    """Size of the models in ``names``, and their speed as a multiple of the first one's."""
    from sparsellm_lightning.models import measure_speed

    found = measure_speed(job["names"])
    return {
        speed.name: {
            "parameters": speed.parameters,
            "zeros": speed.zeros,
            "file_bytes": speed.file_bytes,
            "prefill": [speed.median("prefill"), speed.times(found[0], "prefill")],
            "decode": [speed.median("decode"), speed.times(found[0], "decode")],
        }
        for speed in found
    }


def _blocks_of(row: str) -> int:
    """The number of blocks that a row leaves out, if its pattern says so."""
    pattern = ROWS[row].get("pattern")
    return pattern.get("blocks", 0) if isinstance(pattern, dict) else 0


def table(known: dict[str, Job], sizes: dict[str, Job]) -> str:
    """A line for each model: perplexities on both texts, size, and speed against dense."""
    texts = list(known["dense"]["perplexity"])
    lines = [
        f"| | one-shot: {' / '.join(texts)} | fine-tuned | parameters, zeros | file, MiB | prefill, decode: times dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in ("dense", *ROWS):
        if row not in known:
            continue
        one_shot, tuned = (
            " / ".join(f"{found['perplexity'][text]:,.1f}" for text in texts) if found else ""
            for found in (known[row], known.get(f"{row}, fine-tuned"))
        )
        line = [row, one_shot, tuned, "", "", ""]
        if size := sizes.get(row):
            line[3:] = [
                f"{size['parameters'] / 1e6:.1f} M, {100 * size['zeros'] / size['parameters']:.0f} %",
                f"{size['file_bytes'] / 2**20:.0f}",
                f"{size['prefill'][1]:.2f}, {size['decode'][1]:.2f}",
            ]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, "--model", "--layers", "--windows", "--train-files", "--test-files")
    arguments.add_argument("--out", type=Path, required=True, help="folder of budgets.json and of the exports")
    arguments.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="all by default")
    arguments.add_argument(
        "--tuned", nargs="*", choices=list(ROWS), default=TUNED, help="of the rows; those not alone by default"
    )
    arguments.add_argument("--steps", type=int, default=150, help="of fine-tuning")
    arguments.add_argument("--rate", type=float, default=3e-4, help="largest learning rate of fine-tuning")
    arguments.add_argument("--results", type=Path, help="Markdown file whose section budgets is replaced")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts = [TEST_TEXT, PYTHON_DOCS] if options.train_files else [PYTHON_DOCS]
    with prepared(options, texts) as job:
        train = text(job["model"], options.train_files).train_dataloader()
        job["train"] = save_windows(Path(job["model"]).with_name("train.pt"), train)
        folders = {row: options.out / row.replace(" %", "-percent").replace(",", "").replace(" ", "-") for row in ROWS}
        every, wanted = {"dense": job}, ["dense"]
        blocks = AutoConfig.from_pretrained(job["model"]).num_hidden_layers
        for row in (row for row in ROWS if _blocks_of(row) < blocks):
            here = {**job, "row": row, "folder": str(folders[row]), "config": {**DISTILLED, **ROWS[row]}}
            every |= {row: here, f"{row}, fine-tuned": {**here, "steps": options.steps, "rate": options.rate}}
            if row in options.rows:
                wanted += [row, *([f"{row}, fine-tuned"] if row in options.tuned else [])]
        known = complete(options.out / "budgets.json", every, wanted, __file__)
        names = {job["model"]: "dense"} | {
            str(folder): row for row, folder in folders.items() if row in known and folder.exists()
        }
        sizes = run_job(__file__, {"names": list(names)})
    found = table(known, {names[path]: size for path, size in sizes.items()})
    if options.results:
        write_section(options.results, "budgets", found)
    print(found)


if __name__ == "__main__":
    if "--job" in sys.argv:
        print(json.dumps(answer(json.loads(sys.argv[sys.argv.index("--job") + 1]))))
    else:
        main()
