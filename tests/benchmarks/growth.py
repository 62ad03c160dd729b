"""How time and memory grow with tokens, blocks and width: LLaMA blocks with random weights, one process per point.

    python tests/benchmarks/growth.py [--axis tokens blocks width] [--method sparsegpt sparsellm] [--json growth.json]

Each axis is varied alone; exponents are those of the seconds of pruning, and of the peak memory above what the process had
before. The last width is one block of LLaMA-2-7B (d = 4096, f = 11008); ``--largest 2048`` leaves it out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import exponent, forget_peak, peak_bytes, run_job

BASE = {"windows": 16, "blocks": 4, "dim": 512}
AXES = {
    "tokens": ("windows", [16, 32, 64]),
    "blocks": ("blocks", [4, 8, 16]),
    "width": ("dim", [512, 1024, 2048, 4096]),
}


def job(point: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsellm_lightning import PruningConfig, prune_model

    torch.manual_seed(0)
    dim = point["dim"]
    width = 11008 * dim // 4096
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=dim,
        intermediate_size=width,
        num_hidden_layers=point["blocks"],
        num_attention_heads=dim // 64,
        num_key_value_heads=dim // 64,
    )
    model = LlamaForCausalLM(config)
    windows = torch.randint(1000, (point["windows"], 512))
    settings = PruningConfig(
        preset="paper",
        sparsity=0.7,
        method=point["method"],
        num_iterations=point["iterations"],
        num_calibration_samples=len(windows),
    )
    # The first run of a process pays for threads, allocator and libraries.
    prune_model(
        LlamaForCausalLM(
            LlamaConfig(
                **{
                    **config.to_dict(),
                    "num_hidden_layers": 1,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_attention_heads": 1,
                    "num_key_value_heads": 1,
                }
            )
        ),
        windows[:2].split(2),
        PruningConfig(preset="paper", sparsity=0.7, method=point["method"], num_calibration_samples=2),
    )
    before = forget_peak()
    report = prune_model(model, windows.split(8), settings)
    return {
        "seconds": report.wall_seconds,
        "bytes": peak_bytes() - before,
        "share": report.peak_share(),
        "phases": report.phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--axis", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--method", nargs="+", default=["sparsegpt", "sparsellm"])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--largest", type=int, default=4096, help="largest d on the width axis")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(json.loads(options.job))))
        return

    from sparsellm_lightning.reporting import format_table

    rows: list[tuple[str, ...]] = [("method", "axis", "sizes", "seconds", "exponent", "MiB", "exponent", "of peak")]
    figures: list[dict[str, Any]] = []
    for method in options.method:
        for axis in options.axis:
            key, sizes = AXES[axis]
            sizes = [size for size in sizes if axis != "width" or size <= options.largest]
            points = []
            for size in sizes:
                point = {**BASE, "method": method, "iterations": options.iterations, key: size}
                if axis == "width":
                    point |= {"blocks": 1, "windows": 8}
                points.append(point | run_job(__file__, point))
                print(points[-1], flush=True)
            figures += points
            seconds, memory = [p["seconds"] for p in points], [max(p["bytes"], 1) for p in points]
            rows.append(
                (
                    *(method, axis, " ".join(map(str, sizes))),
                    *(" ".join(f"{s:.1f}" for s in seconds), f"{exponent(sizes, seconds):.2f}"),
                    *(" ".join(f"{m / 2**20:.0f}" for m in memory), f"{exponent(sizes, memory):.2f}"),
                    " ".join(f"{100 * p['share']:.0f} %" for p in points),
                )
            )
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
