"""Perplexity, size and speed of SmolLM2-135M by budget: smaller dense models, 2:4 and unstructured zeros, also fine-tuned.

    python tests/benchmarks/budgets.py --out budgets --train-files train.txt --test-files test.txt
        [--rows "80 % of parameters"] [--steps 150] [--layers 6] [--windows 32] [--results recipes/RESULTS.md]

Every row is pruned by preset ``fast`` with 32 distillation steps, exported, and then fine-tuned as the recipe
finetune/distilled.yaml does, half of the loss being from the dense model's distributions, but by steps of 1,024 tokens and at a
lower rate, because there is less to repair than at 70 % zeros. All exports and the dense model are measured for speed in turn,
in one process, as ``sparsellm benchmark`` does.

Finished rows are kept in ``budgets.json`` and in folders beside it. ``--results`` writes the table into a section of that file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import PYTHON_DOCS, TEST_TEXT, Job, parser, prepared, run_job, save_windows, scores, text, write_section

DISTILLED: dict[str, Any] = {"preset": "fast", "distillation_steps": 32}
ROWS: dict[str, dict[str, Any]] = {
    "80 % of parameters": {"pattern": {"parameters": 0.8}},
    "70 % of parameters": {"pattern": {"parameters": 0.7}},
    "2:4 zeros": {"pattern": "2:4"},
    "50 % zeros": {"sparsity": 0.5},
}
STEP_WINDOWS = 2  # of 512 tokens


def answer(job: Job) -> Job:
    if "names" in job:
        return speed_job(job)
    return prune_job(job) if "config" in job else fine_tune_job(job)


def prune_job(job: Job) -> Job:
    """Prune by ``config``, export into ``folder``, and evaluate."""
    from sparsellm_lightning import PruningConfig, load_model, load_tokenizer, prune_model
    from sparsellm_lightning.architecture import describe
    from sparsellm_lightning.models import export_model, shrink

    model = load_model(job["model"])
    windows = torch.load(job["windows"])
    config = PruningConfig(num_calibration_samples=len(windows), **job["config"])
    report = prune_model(model, windows.split(8), config)
    found: Job = scores(model, job["texts"])["perplexity"]
    if config.removes:
        model = shrink(describe(model, config), config).model
    export_model(model, job["folder"], load_tokenizer(job["model"]), overwrite=True, report=report.to_dict)
    return found


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
    found: Job = scores(module.model.eval(), job["texts"])["perplexity"]
    return found


def speed_job(job: Job) -> Job:
    """Size of the models in ``names``, and their speed as a multiple of the first one's."""
    from sparsellm_lightning.models import measure_speed

    found = measure_speed(job["names"])
    return {
        Path(speed.name).name: {
            "parameters": speed.parameters,
            "zeros": speed.zeros,
            "file_bytes": speed.file_bytes,
            "prefill": [speed.median("prefill"), speed.times(found[0], "prefill")],
            "decode": [speed.median("decode"), speed.times(found[0], "decode")],
        }
        for speed in found
    }


def table(known: dict[str, Job]) -> str:
    """A line for each model: perplexities on both texts, size, and speed against dense."""
    texts = list(known["dense"]["one-shot"])
    lines = [
        f"| | one-shot: {' / '.join(texts)} | fine-tuned | parameters, zeros | file, MiB | prefill, decode: times dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in known.items():
        size = row.get("speed")
        if size is None:
            continue
        perplexities = [
            " / ".join(f"{row[kind][text]:,.1f}" for text in texts) if row.get(kind) else ""
            for kind in ("one-shot", "fine-tuned")
        ]
        lines.append(
            f"| {name} | {' | '.join(perplexities)} | {size['parameters'] / 1e6:.1f} M, "
            f"{100 * size['zeros'] / size['parameters']:.0f} % | {size['file_bytes'] / 2**20:.0f} | "
            f"{size['prefill'][1]:.2f}, {size['decode'][1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, "--model", "--layers", "--windows", "--train-files", "--test-files")
    arguments.add_argument("--out", type=Path, required=True, help="folder of budgets.json and of the exports")
    arguments.add_argument("--rows", nargs="*", default=list(ROWS), help="names of rows; all by default")
    arguments.add_argument("--steps", type=int, default=150, help="of fine-tuning; 0: none")
    arguments.add_argument("--rate", type=float, default=3e-4, help="largest learning rate of fine-tuning")
    arguments.add_argument("--results", type=Path, help="Markdown file whose section budgets is replaced")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "budgets.json"
    known: dict[str, Job] = json.loads(file.read_text()) if file.exists() else {}
    texts = [TEST_TEXT, PYTHON_DOCS] if options.train_files else [PYTHON_DOCS]
    with prepared(options, texts) as job:
        if "dense" not in known:
            known["dense"] = {"one-shot": run_job(str(Path(__file__).with_name("common.py")), job)["perplexity"]}
        train = text(job["model"], options.train_files).train_dataloader()
        job["train"] = save_windows(Path(job["model"]).with_name("train.pt"), train)
        folders = {row: options.out / row.replace(" % ", "-percent-").replace(" ", "-") for row in options.rows}
        for row, folder in folders.items():
            training = {"row": row, "steps": options.steps, "rate": options.rate}
            work = {"one-shot": {"config": {**DISTILLED, **ROWS[row]}}} | (
                {"fine-tuned": training} if options.steps else {}
            )
            for kind, settings in work.items():
                if kind not in known.setdefault(row, {}):
                    known[row][kind] = run_job(__file__, {**job, **settings, "folder": str(folder)})
                    file.write_text(json.dumps(known, indent=1))
                    print(row, kind, known[row][kind], file=sys.stderr, flush=True)
        names = {job["model"]: "dense"} | {str(folder): row for row, folder in folders.items()}
        for name, speed in run_job(__file__, {"names": list(names)}).items():
            known[next(row for path, row in names.items() if Path(path).name == name)]["speed"] = speed
        file.write_text(json.dumps(known, indent=1))
    found = table(known)
    if options.results:
        write_section(options.results, "budgets", found)
    print(found)


if __name__ == "__main__":
    if "--job" in sys.argv:
        print(json.dumps(answer(json.loads(sys.argv[sys.argv.index("--job") + 1]))))
    else:
        main()
