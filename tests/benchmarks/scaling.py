"""Seconds and memory of pruning SmolLM2-135M on 1 and 2 ranks, one thread each, in one run.

    python tests/benchmarks/scaling.py [--layers 8] [--iterations 4] [--train-files train.txt] [--json scaling.json]

Calibration is the forward of the blocks and the Gram matrices of their inputs; the solver is everything else: the local
solver and the alternation. Both are the largest over ranks. The masks of each run are compared with one process's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import model_folder

RUNS = [("one process", None, 1), ("DDP", "ddp", 2), ("FSDP2", "fsdp2", 2)]


def worker(folder: Path, options: dict[str, Any]) -> None:
    import lightning.pytorch as pl
    import torch

    from sparsellm_lightning import CausalLM, SparseLLMCallback, TextDataModule
    from sparsellm_lightning.distributed import local_tensor

    torch.set_num_threads(1)

    class Measured(SparseLLMCallback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_train_end(trainer, pl_module)
            held = sum(local_tensor(p).nbytes for p in {id(p): p for p in pl_module.parameters()}.values())
            assert self.report is not None
            result = {
                "phases": self.report.phases,
                "parameter_bytes": held,
                "peak_bytes": self.report.peak_memory_bytes,  # before the export gathers the model
            }
            (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))

    pruner = Measured(
        preset="paper",
        sparsity=0.7,
        num_calibration_samples=options["windows"],
        num_iterations=options["iterations"],
        export_dir=str(folder / "out"),
        measure=False,
    )
    files = options["train_files"]
    data = TextDataModule("files" if files else "python-docs", sequence_length=512, batch_size=8, train_files=files)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=options["ranks"],
        strategy=options["strategy"] or "auto",
        callbacks=[pruner],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(CausalLM(options["model"]), data)


def run(folder: Path, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "options.json").write_text(json.dumps(options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, "--worker", str(folder)], check=True, env=environment)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(options["ranks"])]


def mask(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from sparsellm_lightning.architecture import describe

    layout = describe(AutoModelForCausalLM.from_pretrained(folder))
    return torch.cat([(p.parameter.detach() != 0).flatten() for p in layout.projections()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help="only the first so many blocks, all 30 by default")
    parser.add_argument(
        "--iterations", type=int, default=4, help="of the alternation; calibration does not depend on them"
    )
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--train-files", nargs="*", default=None, help="text, instead of python-docs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, json.loads((arguments.worker / "options.json").read_text()))
        return

    from sparsellm_lightning.reporting import format_table

    rows: list[tuple[str, ...]] = [
        ("run", "calibration s", "x", "solver s", "x", "parameters", "peak MiB", "masks equal")
    ]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        model = model_folder(base / "model", arguments.layers)
        one: dict[str, float] = {}
        for name, strategy, ranks in RUNS:
            folder = base / (strategy or "one")
            files = [str(Path(f).resolve()) for f in arguments.train_files] if arguments.train_files else None
            chosen = {"windows": arguments.windows, "iterations": arguments.iterations, "train_files": files}
            results = run(folder, model=model, strategy=strategy, ranks=ranks, **chosen)
            phases = [r["phases"] for r in results]
            measured = {
                "calibration": max(p["forward"] + p["statistics"] for p in phases),
                "solver": max(p["local_solve"] + p["alternation"] for p in phases),
                "parameters": max(r["parameter_bytes"] for r in results),
                "peak": max(r["peak_bytes"] for r in results),
                "phases": phases,
            }
            one = one or measured
            equal = float((mask(base / "one" / "out") == mask(folder / "out")).double().mean())
            figures[name] = {**measured, "masks_equal": equal}
            rows.append(
                (
                    f"{name}, {ranks} rank{'s' * (ranks > 1)}",
                    *(f"{measured['calibration']:.1f}", f"{one['calibration'] / measured['calibration']:.2f}"),
                    *(f"{measured['solver']:.1f}", f"{one['solver'] / measured['solver']:.2f}"),
                    *(f"{measured['parameters'] / one['parameters']:.2f}", f"{measured['peak'] / 2**20:.0f}"),
                    f"{100 * equal:.4f} %",
                )
            )
    print(format_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
