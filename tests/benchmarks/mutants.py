"""Do the tests of the solvers notice a wrong sign, factor, transpose or comparison?

    python tests/benchmarks/mutants.py [--modules admm sparsegpt] [--jobs 2] [--out mutants.json]
        [--results recipes/RESULTS.md]

Every mutant changes one place of one module. It survives if all tests of that module pass, which they must without any change
too. Each mutant runs in a fork of one process that has imported the libraries, on its own copy of the package. Survivors are
listed with file, line, change and the reason, from :data:`SAME` and :data:`SEARCH`; ``--results`` writes them into a section
of a Markdown file.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common import write_section

ROOT = Path(__file__).parents[2]
PACKAGE = "sparsellm_lightning"
LOCAL = ("test_local.py", "test_properties.py")
TESTS: dict[str, tuple[str, ...]] = {
    "activations": ("test_activations.py",),
    "admm": LOCAL,
    "auxiliaries": ("test_sparsellm.py",),
    "divergence": ("test_divergence.py",),
    "factorization": ("test_statistics.py", *LOCAL),
    "feed_forward": ("test_sparsellm.py",),
    "local": LOCAL,
    "magnitude": LOCAL,
    "columns": ("test_columns.py", "test_neurons.py"),
    "neurons": ("test_neurons.py",),
    "patterns": ("test_patterns.py", "test_containing.py", "test_ranks.py"),
    "ranks": ("test_ranks.py", "test_patterns.py"),
    "sparsegpt": LOCAL,
    "sparsellm": ("test_sparsellm.py",),
    "statistics": ("test_statistics.py", "test_local.py"),
    "storage": ("test_storage.py",),
    "wanda": LOCAL,
}
# Reasons by module and the beginning of "before -> after". First: changes that no caller sees.
_TIE = "equal values may be taken either way"
_PIECES = "size of the pieces of a computation"
_MESSAGE = "which of two exact exchanges between ranks, or its padding"
_RANKING = "the same ranking"
SAME: dict[str, dict[str, str]] = {
    "activations": {
        "2 -> 4": _PIECES,
        "15 -> 30": _PIECES,
        "first.device.type": "in pieces on an accelerator, whole on a CPU",
        "candidate_cost < cost": _TIE,
        "cost_positive < cost_negative": _TIE,
        "m + fraction * radius": "the fractions lie on both sides",
        "exact > 0.1 * gauss_newton -> exact >=": _TIE,
    },
    "admm": {
        "w.square -> w.abs": _RANKING,
        "t.square -> t.abs": _RANKING,
        "squares > least": _TIE,
        "curvature > ": _TIE,
    },
    "auxiliaries": {
        "4 -> 8": "entries that are not used",
        "squares[:4] / squares[4]": "only ratios of scales are used",
    },
    "factorization": {
        "4 / 3": "count of operations",
        "4 -> 8": "count of operations",
        "3 -> 6": "count of operations",
        "size <= _LEAF": _PIECES,
        "2 -> 4": _PIECES,
    },
    "local": {"errors[0] > errors[1]": _TIE, "errors[0] <= _CLEARLY": _TIE},
    "patterns": {
        "2 -> 4": _MESSAGE,
        "20 -> 40": _MESSAGE,
        "ranks.size * sum": _MESSAGE,
        "m.shape[1] * rows": _MESSAGE,
        "-rows // self.ranks.size": _MESSAGE,
        "flat.device.type": "by partition on a CPU, by sorting on an accelerator",
        "count - 1 -> count + 1": "runs on accelerators only; tests/accelerator compares",
        "1 -> 2": "runs on accelerators only, or a limit that is not reached",
        "wanted_ties < ties": "all ties are wanted then",
        "bins - 1": "a limit that is not reached",
    },
    "sparsegpt": {
        "columns > leaf": _PIECES,
        "high < columns": "a product without columns",
        "i + 1": "a product without columns",
        "columns // group": _PIECES,
        "-rows // _ROW_MULTIPLE": "padding",
        "2 -> 4": _PIECES,
    },
    "sparsellm": {"criterion < best_error": _TIE},
    "statistics": {"ranks.size > 1": "one rank takes the way of several"},
}
# Then: changes of a search, which ends as near to the minimum by another way.
_START = "a starting point among ten"
_STEP = "length of a step that is taken only if it lowers the objective"
_PENALTY = "when, or how fast, the penalty grows"
SEARCH: dict[str, dict[str, str]] = {
    "activations": {
        "-0.5": _START,
        "-1.0": _START,
        "1 -> 2": f"{_START}; {_STEP}",
        "0.1": _STEP,
    },
    "admm": {
        "iteration + 1": _PENALTY,
        "1 -> 2": _PENALTY,
        "direction.square": "from where a row's refinement stops",
    },
}
TIMEOUT = 120  # seconds after which a mutant counts as noticed: it loops

_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_METHODS = {
    "add_": "sub_",
    "sub_": "add_",
    "mul_": "div_",
    "div_": "mul_",
    "square": "abs",
    "sqrt": "abs",
    "argmin": "argmax",
    "minimum": "maximum",
    "maximum": "minimum",
}


@dataclass
class Mutant:
    """One change."""

    module: str
    line: int
    before: str
    after: str
    survived: bool = False

    @property
    def change(self) -> str:
        return f"{self.before} -> {self.after}"

    def reason(self, reasons: dict[str, dict[str, str]]) -> str | None:
        """The reason given for the longest beginning of the change. None if there is none."""
        found = [start for start in reasons.get(self.module, {}) if self.change.startswith(start)]
        return reasons[self.module][max(found, key=len)] if found else None


def mutants(module: str) -> Iterator[tuple[Mutant, str]]:
    """Every mutant of a module of the solvers, with its source."""
    path = ROOT / PACKAGE / "solvers" / f"{module}.py"
    tree = ast.parse(path.read_text())
    for index, place in enumerate(_places(tree)):
        changed = copy.deepcopy(tree)
        node = _places(changed)[index]
        _change(node)
        mutant = Mutant(module, place.lineno, ast.unparse(place), ast.unparse(node))
        yield mutant, ast.unparse(ast.fix_missing_locations(changed))


def _places(tree: ast.Module) -> list[ast.expr]:
    """Nodes that can be changed, apart from counts of operations, which decide nothing."""
    counts = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "count"
        for inner in ast.walk(node)
    ]
    # Numbers count where an operation uses them. Defaults, sizes, indices and limits are not part of a formula.
    operands = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp)
        for inner in (node.left, node.right)
        if isinstance(inner, ast.Constant)
    }
    ignored = {id(node) for node in counts}
    ignored |= {id(node) for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in operands}
    return [n for n in ast.walk(tree) if isinstance(n, ast.expr) and id(n) not in ignored and _changes(n)]


def _changes(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _BINARY
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in _COMPARISONS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub)
    if isinstance(node, ast.Attribute):
        return node.attr == "T" or node.attr in _METHODS
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _change(node: ast.expr) -> None:
    if isinstance(node, ast.BinOp):
        node.op = _BINARY[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops[0] = _COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Attribute):
        node.attr = _METHODS.get(node.attr, "data")  # a matrix without its transpose
    elif isinstance(node, ast.Constant):
        node.value = node.value * 2 if node.value else 1  # type: ignore[operator]


def start(module: str, source: str | None = None) -> tuple[int, Path]:
    """Run a module's tests, with another source of it, in a fork: its process, and its copy of the package."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE)
    if source is not None:
        (folder / PACKAGE / "solvers" / f"{module}.py").write_text(source)
    process = os.fork()
    if process:
        return process, folder
    signal.alarm(TIMEOUT)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path[:0] = [str(folder), str(ROOT / "tests")]
    os.chdir(ROOT)
    import pytest

    tests = [f"tests/solvers/{name}" for name in TESTS[module]]
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    os._exit(int(status != 0))


def summary(mutants: list[Mutant]) -> str:
    """How many survived, and each survivor with its reason, as Markdown."""
    survivors = sorted((m for m in mutants if m.survived), key=lambda m: (m.module, m.line))
    same = [m for m in survivors if m.reason(SAME)]
    search = [m for m in survivors if not m.reason(SAME) and m.reason(SEARCH)]
    noticed = [m for m in survivors if m not in same]
    lines = [
        f"{len(mutants)} changes, of which {len(same)} change nothing that a caller sees. Of the other "
        f"{len(mutants) - len(same)}, {len(noticed)} survive ({100 * len(noticed) / max(len(mutants) - len(same), 1):.1f} %): "
        f"{len(search)} inside searches, {len(noticed) - len(search)} without a reason.",
        "",
        "| survivor | change | why |",
        "|---|---|---|",
    ]
    for m in survivors:
        why = m.reason(SAME) or m.reason(SEARCH) or "**none**"
        kind = "search: " if m in search else ""
        lines.append(f"| `{m.module}.py` | `{m.before[:60]}` → `{m.after[:60]}` | {kind}{why} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modules", nargs="*", choices=list(TESTS), default=list(TESTS), help="of the solvers; all by default"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of mutants at once")
    parser.add_argument("--out", type=Path, help="JSON file of all mutants")
    parser.add_argument("--results", type=Path, help="Markdown file whose section mutants is replaced")
    options = parser.parse_args()

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import hypothesis
    import lightning.pytorch
    import torch
    import transformers.models.llama.modeling_llama

    imported = (hypothesis, lightning.pytorch, transformers.models.llama.modeling_llama)
    assert all(imported)
    torch.set_num_threads(1)
    for module in options.modules:
        process, folder = start(module)
        _, status = os.waitpid(process, 0)
        shutil.rmtree(folder)
        if status:
            sys.exit(f"the tests of {module}.py do not pass as it is, or take more than {TIMEOUT} seconds")
    pending = [pair for module in options.modules for pair in mutants(module)]
    print(f"{len(pending)} mutants", file=sys.stderr)
    running: dict[int, tuple[Mutant, Path]] = {}
    done: list[Mutant] = []
    stopped = 0
    began = time.monotonic()
    while pending or running:
        while pending and len(running) < options.jobs:
            mutant, source = pending.pop(0)
            process, folder = start(mutant.module, source)
            running[process] = mutant, folder
        process, status = os.wait()
        mutant, folder = running.pop(process)
        shutil.rmtree(folder)
        mutant.survived = status == 0
        stopped += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        done.append(mutant)
        if mutant.survived:
            print(f"survived: {mutant.module}.py:{mutant.line}: {mutant.change}", flush=True)
    text = summary(done)
    print(f"{text}\n{stopped} stopped after {TIMEOUT} seconds\n{time.monotonic() - began:.0f} seconds")
    if options.results:
        write_section(options.results, "mutants", f"### Changes to the solvers that tests notice\n\n{text}")
    if options.out:
        options.out.write_text(json.dumps([asdict(mutant) for mutant in done], indent=1))


if __name__ == "__main__":
    main()
