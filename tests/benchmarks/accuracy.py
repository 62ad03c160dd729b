"""Perplexity after pruning models by every preset, by the local solvers and by llm-compressor, from the same windows.

    python tests/benchmarks/accuracy.py --out accuracy --train-files train.txt --test-files test.txt [--models MODEL ...]
        [--seeds 0 1] [--rows sparsegpt best] [--columns 70 2:4] [--ablation balanced] [--allocations] [--together 2]
        [--layers 6] [--windows 32] [--results recipes/RESULTS.md]

Prints tables, and writes them as ``accuracy.json``, ``accuracy.md`` and ``accuracy.png``; with ``--results`` also into a
section of that Markdown file. A cell is one process. A finished cell is kept in ``accuracy.json``, by its row, its column and
a hash of its configuration, the model's weights and its windows. The hash does not cover the code. So a run that was killed,
or is asked for more cells, goes on. ``--again`` measures the chosen cells again. With ``--together N``, N cells run at once,
each on its share of the cores. R compares cells of one machine only. Memory is shown if it is of the machine that makes the
table, and seconds if as many cells ran at once, too. The tables show all known cells.

The gap of a cell is ``ln(perplexity / dense perplexity)``. R is the gap divided by that of this package's ``sparsegpt`` at the
same sparsity and seed: 0 is the dense model, 1 SparseGPT. With several ``--seeds``, each of which chooses other calibration
windows, tables show means, and mark the cells of which some seeds are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from common import (
    LLM_COMPRESSOR,
    PYTHON_DOCS,
    PYTHON_SOURCE,
    SMOLLM2,
    TEST_TEXT,
    Job,
    hash_of,
    machine,
    measure,
    other_python,
    parser,
    prepared,
    write_section,
)
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sparsellm_lightning import PruningConfig
from sparsellm_lightning.config import PRESETS, Allocation
from sparsellm_lightning.models import replace_text

Cell = tuple[str, str]  # its row and its column
Settings = dict[str, Any]

DENSE: Cell = ("dense", "0")
ROWS: dict[str, Settings] = {
    "magnitude": {"preset": "paper", "method": "magnitude"},
    "wanda": {"preset": "paper", "method": "wanda"},
    "sparsegpt": {"preset": "paper", "method": "sparsegpt"},
    "admm": {"preset": "paper", "method": "admm"},
    **{preset: {"preset": preset} for preset in PRESETS},
    "llm-compressor SparseGPT": {"modifier": "SparseGPTModifier", "block_size": 128, "dampening_frac": 0.01},
    "llm-compressor Wanda": {"modifier": "WandaPruningModifier"},
}
COLUMNS: dict[str, Settings] = {
    **{str(percent): {"sparsity": percent / 100} for percent in (50, 60, 70, 80, 90)},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
}
# Only these rows have all columns.
WHOLE_ROWS = ("sparsegpt", "paper", "balanced", "best")
SELDOM = ("60",)
BEFORE = {"balanced": "paper", "best": "balanced"}  # a preset, and the one that it adds parts to
PERPLEXITY, SHARE, SECONDS, MEMORY = FIGURES = ("perplexity", "R", "seconds", "MiB over the model")


def parts_of(preset: str) -> dict[str, Settings]:
    """A preset without one of its parts at a time: each setting that differs from the preset before it put back."""
    before = PRESETS[BEFORE[preset]]
    without = {name: before[name] for name, value in PRESETS[preset].items() if value != before[name]}
    return {f"{preset}, {name}={value}": {"preset": preset, name: value} for name, value in without.items()}


def allocations() -> dict[str, Settings]:
    """Preset ``balanced`` with every allocation. Not ``best``, which takes longer."""
    own = PRESETS["balanced"]["allocation"]
    return {
        "balanced" if value == own else f"balanced, allocation={value}": {"preset": "balanced", "allocation": value}
        for value in get_args(Allocation)
    }


ALL_ROWS = {**allocations(), **{row: value for preset in BEFORE for row, value in parts_of(preset).items()}, **ROWS}


def config_of(cell: Cell) -> Settings:
    row, column = cell
    return {**ALL_ROWS[row], **COLUMNS[column]}


class Results:
    """Figures of finished cells of one model and seed, on disk.

    Args:
        path: of a JSON file, created by the first :meth:`add`. It may hold cells of other runs.
        job: what all cells of this run have in common, as :func:`common.prepared` gives it.
        seed: of the settings. It has chosen the job's windows too.
        together: number of cells at once. Only cells that were measured so have comparable seconds.
    """

    def __init__(self, path: Path, job: Job, seed: int, together: int) -> None:
        self.path, self.seed, self.texts, self.content = path, seed, list(job["texts"]), job["content"]
        self.together = together
        self.known: dict[str, Job] = json.loads(path.read_text()) if path.exists() else {}

    def key(self, cell: Cell) -> str:
        settings: Settings = {"content": self.content}
        if cell != DENSE:
            config = self.config_of(cell)
            theirs = "modifier" in config
            settings["config"] = {**config, "package": LLM_COMPRESSOR} if theirs else asdict(PruningConfig(**config))
        return " | ".join((*cell, hash_of(settings)))

    def config_of(self, cell: Cell) -> Settings:
        config = config_of(cell)
        return config if "modifier" in config else {**config, "seed": self.seed}

    def find(self, cell: Cell) -> Job | None:
        return self.known.get(self.key(cell))

    def add(self, cell: Cell, figures: Job) -> None:
        self.known[self.key(cell)] = figures
        replace_text(self.path, json.dumps(self.known, indent=1))

    def gap(self, cell: Cell, text: str) -> float | None:
        dense, pruned = self.find(DENSE), self.find(cell)
        if dense is None or pruned is None:
            return None
        return math.log(pruned["perplexity"][text] / dense["perplexity"][text])

    def share(self, cell: Cell, text: str) -> float | None:
        """R: the gap divided by SparseGPT's on the same machine, because rounding alone moves both."""
        cells = (cell, ("sparsegpt", cell[1]), DENSE)
        machines = {found.get("machine") for one in cells if (found := self.find(one)) is not None}
        own, reference = (self.gap(one, text) for one in cells[:2])
        return own / reference if own and reference and len(machines) == 1 and machines != {None} else None

    def figures(self, cell: Cell, figure: str) -> list[float] | None:
        """One of the :data:`FIGURES`: perplexity and R on every text, or a single number. None if it is not known."""
        found = self.find(cell)
        if found is None:
            return None
        if figure in (SECONDS, MEMORY) and found.get("machine") != machine():
            return None
        if figure == SECONDS:
            return [found["seconds"]] if found["together"] == self.together else None
        if figure == MEMORY:
            return [(found["peak_bytes"] - found["before_bytes"]) / 2**20]
        if figure == PERPLEXITY:
            return [found["perplexity"][text] for text in self.texts]
        shares = [share for text in self.texts if (share := self.share(cell, text)) is not None]
        return shares if len(shares) == len(self.texts) else None


def show(seeds: Sequence[Results], cell: Cell, figure: str) -> str:
    """Mean over seeds of one of the :data:`FIGURES` of a cell, as a table shows it: perplexity and R on every text."""
    figures = [values for results in seeds if (values := results.figures(cell, figure)) is not None]
    if not figures:
        return ""
    means = [statistics.fmean(values) for values in zip(*figures, strict=True)]
    shown = " / ".join(_shown(mean, figure) for mean in means)
    return shown + (" *" if len(figures) < len(seeds) else "")


def _shown(value: float, figure: str) -> str:
    digits = {PERPLEXITY: 1 if value < 1000 else 0, SHARE: 2}.get(figure, 0)
    return f"{value:,.{digits}f}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _sparsity(column: str) -> str:
    return column if ":" in column else f"{column} %"


def main_cells() -> list[Cell]:
    return [(row, column) for column in COLUMNS for row in ROWS if column not in SELDOM or row in WHOLE_ROWS]


def work_of(job: Job, results: Results, cell: Cell) -> Job:
    """What a process has to do for a cell."""
    if cell == DENSE:
        return {name: job[name] for name in ("model", "texts")}
    return {**job, "config": results.config_of(cell)}


def table(seeds: Sequence[Results], rows: Iterable[str], pairs: Sequence[tuple[str, str]]) -> str:
    """One Markdown table: a column for every pair of a sparsity and a figure. What is not known at all is left out."""
    shown = {row: [show(seeds, (row, column), figure) for column, figure in pairs] for row in rows}
    rows = [row for row in shown if any(shown[row])]
    known = [i for i in range(len(pairs)) if any(shown[row][i] for row in rows)]
    alike = len({figure for _, figure in pairs}) == 1
    heads = [_sparsity(pairs[i][0]) if alike else f"{_sparsity(pairs[i][0])}: {pairs[i][1]}" for i in known]
    lines = [["", *heads], *([row, *(shown[row][i] for i in known)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) + 1)]
    lines.insert(1, ["-" * (widths[0]), *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line)) + " |"
        for line in lines
    )


def markdown(seeds: Sequence[Results], title: str) -> str:
    """All that is known under these settings."""
    dense = seeds[0].find(DENSE)
    found = [(cell, results.find(cell)) for results in seeds for cell in main_cells()]
    off = [abs(result["sparsity"] - COLUMNS[c]["sparsity"]) for (_, c), result in found if result is not None]
    parts = [f"### {title}"]
    note = f"Perplexity on {' / '.join(seeds[0].texts)}"
    if dense is not None:
        note += (
            f"; the dense model: {' / '.join(_shown(dense['perplexity'][text], PERPLEXITY) for text in seeds[0].texts)}"
        )
    note += f". Zeros are at most {100 * max(off, default=0):.3f} points off what the column says."
    parts.append(note + (" \\* some seeds are missing." if len(seeds) > 1 else ""))
    headings = {
        PERPLEXITY: "Perplexity",
        SHARE: "R: ln(perplexity / dense) as a share of sparsegpt's",
        SECONDS: f"Seconds of pruning on {os.cpu_count()} cores, cells at once: {seeds[0].together}",
        MEMORY: "Peak memory over the loaded model, MiB",
    }
    for figure, heading in headings.items():
        if any(show(seeds, (row, column), figure) for row in ROWS for column in COLUMNS):
            parts += [f"#### {heading}", table(seeds, ROWS, [(column, figure) for column in COLUMNS])]
    own = PRESETS["balanced"]["allocation"]
    for heading, rows, columns in (
        *((f"Preset {preset} without one of its parts", [preset, *parts_of(preset)], ["70"]) for preset in BEFORE),
        (f"Preset balanced with other allocations than its own, {own}", list(allocations()), ["70", "80"]),
    ):
        more = [(row, column) for row in rows if row not in ROWS for column in columns]
        if any(results.find(cell) for results in seeds for cell in more):
            pairs = [(column, figure) for column in columns for figure in FIGURES]
            parts += [f"#### {heading}", table(seeds, rows, pairs)]
    return "\n\n".join(parts) + "\n"


def plot(results: Results, title: str, text: str) -> Figure:
    """Perplexity against sparsity, and what its gap at 70 % costs in seconds."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    percents = [column for column in COLUMNS if ":" not in column]
    for index, row in enumerate(ROWS):
        style = {"color": f"C{index}", "linestyle": ":" if "modifier" in ROWS[row] else "-"}
        known = [(int(c), result["perplexity"][text]) for c in percents if (result := results.find((row, c)))]
        if known:
            left.plot([k[0] for k in known], [k[1] for k in known], marker=".", label=row, **style)
        if result := results.find((row, "2:4")):
            left.plot(50, result["perplexity"][text], marker="x", color=f"C{index}")
        seconds, gap = results.figures((row, "70"), SECONDS), results.gap((row, "70"), text)
        if seconds is not None and gap is not None:
            right.plot(seconds[0], gap, marker="o", color=f"C{index}")
            right.annotate(row, (seconds[0], gap), xytext=(5, 4), textcoords="offset points", fontsize="small")
    if dense := results.find(DENSE):
        left.axhline(dense["perplexity"][text], color="black", linewidth=1, linestyle="--", label="dense")
    left.set(xlabel="zeros (%); crosses: 2:4", ylabel=f"perplexity on {text}", yscale="log")
    left.set_xticks([int(column) for column in percents])
    if left.lines:
        left.legend(fontsize="small")
    right.set(xlabel="seconds of pruning to 70 %", ylabel="ln(perplexity / dense perplexity) at 70 %")
    right.set(xscale="log", yscale="log")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    right.margins(0.15)
    figure.suptitle(title)
    return figure


def measure_cells(results: Results, job: Job, wanted: Iterable[Cell], options: argparse.Namespace) -> list[Cell]:
    """Measure the cells that are not known. Returns those that failed."""
    cells = [cell for cell in dict.fromkeys(wanted) if options.again or results.find(cell) is None]
    theirs = any("modifier" in config_of(cell) for cell in cells if cell != DENSE)
    python = other_python(options.venv) if theirs else sys.executable
    failed = []
    with ThreadPoolExecutor(options.together) as pool:
        running = {pool.submit(measure, work_of(job, results, cell), python): cell for cell in cells}
        for number, finished in enumerate(as_completed(running), 1):
            cell = running[finished]
            print(f"{number} of {len(cells)}: {cell[0]}, {_sparsity(cell[1])}", file=sys.stderr, flush=True)
            try:
                figures = finished.result()
            except subprocess.CalledProcessError:  # it has said why; the others may still be done
                failed.append(cell)
                continue
            kept = {name: value for name, value in figures.items() if name != "table"}
            results.add(cell, {**kept, "together": options.together, "machine": machine()})
            print({name: figures.get(name) for name in (SECONDS, "perplexity")}, file=sys.stderr, flush=True)
    return failed


def main() -> None:
    arguments = parser(__doc__, "--layers", "--windows", "--train-files", "--test-files", "--venv")
    arguments.add_argument("--out", type=Path, required=True, help="folder of accuracy.json, accuracy.md, accuracy.png")
    arguments.add_argument("--models", nargs="*", default=[SMOLLM2], help="as for model.pretrained")
    arguments.add_argument(
        "--seeds", nargs="*", type=int, default=[0], help="of the choice of windows and the settings"
    )
    arguments.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="all by default")
    arguments.add_argument("--columns", nargs="*", choices=list(COLUMNS), default=list(COLUMNS), help="all by default")
    arguments.add_argument(
        "--ablation", nargs="*", choices=list(BEFORE), default=[], help="presets without each of their parts, at 70 %%"
    )
    arguments.add_argument("--allocations", action="store_true", help="balanced with every allocation, at 70 and 80 %%")
    arguments.add_argument(
        "--together", type=int, default=1, help="number of cells at once, each on its share of the cores"
    )
    arguments.add_argument("--again", action="store_true", help="measure known cells again")
    arguments.add_argument("--results", type=Path, help="Markdown file whose section accuracy is replaced")
    options = arguments.parse_args()

    wanted = [DENSE, *(cell for cell in main_cells() if cell[0] in options.rows and cell[1] in options.columns)]
    wanted += [(row, "70") for preset in options.ablation for row in (preset, *parts_of(preset))]
    if options.allocations:
        wanted += [(row, column) for column in ("70", "80") for row in allocations()]
    texts = [TEST_TEXT, PYTHON_DOCS, PYTHON_SOURCE] if options.train_files else [PYTHON_DOCS, PYTHON_SOURCE]
    if options.together > 1:  # of the processes to come, not of this one
        os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // options.together, 1))

    options.out.mkdir(parents=True, exist_ok=True)
    failed, parts = [], []
    for model in options.models:
        seeds = []
        for seed in options.seeds:
            with prepared(argparse.Namespace(**vars(options), model=model), texts, seed) as job:
                results = Results(options.out / "accuracy.json", job, seed, options.together)
                failed += [f"{model}, {row}, {column}" for row, column in measure_cells(results, job, wanted, options)]
                seeds.append(results)
        name = Path(model.removeprefix("package:")).name
        title = f"{name}, {options.windows} windows of 512 tokens"
        title += f", the first {options.layers} blocks" if options.layers else ""
        title += f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        parts.append(markdown(seeds, title))
        picture = "accuracy.png" if len(options.models) == 1 else f"accuracy-{name}.png"
        shown = f"{title}: the first" if len(seeds) > 1 else title
        plot(seeds[0], shown, texts[0]).savefig(options.out / picture, dpi=120)
    (options.out / "accuracy.md").write_text("\n".join(parts))
    if options.results:
        write_section(options.results, "accuracy", "\n".join(parts))
    print("\n".join(parts))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
