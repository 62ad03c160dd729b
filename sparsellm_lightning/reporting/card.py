"""The model card of an export: what was pruned, how, from which text, and what came of it."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.reporting.report import PruningReport


def model_card(report: PruningReport, images: Sequence[str] = (), packed: bool = False) -> str:
    """``README.md`` of an exported folder.

    Args:
        report: of the run.
        images: names of the plots in the folder.
        packed: whether the files leave the zeros out.
    """
    library = "sparsellm_lightning" if packed else "transformers"
    smaller = "exported" in report.sparsity
    parts = [
        f"---\nlibrary_name: {library}\n{_base(report.model)}tags:\n- pruning\n- sparsellm_lightning\n---",
        f"# {report.model}, {_pattern(report)}",
        _PACKED if packed else "",
        _perplexities(report),
        _sparsity(report),
        "## What is smaller or faster\n\n"
        + (_SMALLER + "." * packed + _ANY_ENGINE * (not packed) if smaller else _ZEROS),
        _texts(report),
        _examples(report),
        _repeat(report),
        "\n\n".join(f"![{name}]({name})" for name in images),
        "`pruning_report.json` holds every measurement; `sparsellm verify DIR` compares it with the files.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_PACKED = (
    "The files leave the zeros out. `sparsellm_lightning.load_model(DIR)` reads them, plain `transformers` does not."
)
_SMALLER = (
    "Hidden units, heads or blocks are removed from the matrices and the configuration. This is a smaller dense model"
)
_ANY_ENGINE = ": any engine runs it, and `sparsellm benchmark` measures how much faster."
_ZEROS = (
    "The weights hold zeros. Engines without sparse kernels run them at dense speed, and plain files are as large as the dense "
    "model's. Zeros pay where 2:4 kernels or compressed files use them."
)


def _base(model: str) -> str:
    """The entry by which the hub links a model to the one that it comes from, if that has a hub id."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).exists()
    return f"base_model: {model}\n" if is_id else ""


def _pattern(report: PruningReport) -> str:
    achieved = f"{100 * report.exported_sparsity:.2f} % zeros"
    return achieved if report.pattern == "unstructured" else f"{report.pattern}, {achieved}"


def _perplexities(report: PruningReport) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in report.losses())
    if not rows:
        return ""
    note = "R: the loss as a share of that of SparseGPT alone." if "R |" in head else ""
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows, "", note]).rstrip()


def _sparsity(report: PruningReport) -> str:
    """Zeros by kind of layer, the last part of a projection's name."""
    sizes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in report.layers:
        size = math.prod(layer["shape"])
        counts = sizes[layer["name"].rsplit(".", 1)[-1]]
        counts[0] += layer["sparsity"] * size
        counts[1] += size
    lines = ["| projections | weights | zeros |", "|---|---|---|"]
    for kind, (zeros, size) in sizes.items():
        lines.append(f"| {kind} | {size:,.0f} | {100 * zeros / size:.2f} % |")
    total = [sum(column) for column in zip(*sizes.values(), strict=True)] if sizes else [0.0, 1.0]
    lines.append(f"| all decoder blocks | {total[1]:,.0f} | {100 * total[0] / total[1]:.2f} % |")
    return "\n".join(["## Sparsity", "", *lines])


def _texts(report: PruningReport) -> str:
    found, lines = report.calibration, []
    if found.get("windows"):
        text = f"text `{found['source']}`" if "source" in found else "the caller's windows"
        held_out = f", {found['held_out']} of them held out" if found.get("held_out") else ""
        written = f" Also {found['written']} windows that the dense model wrote." if found.get("written") else ""
        lines.append(f"{found['windows']} windows of {text}{held_out}: {found['tokens']:,} tokens.{written}")
    if report.evaluation is not None:
        measured = report.evaluation
        lines.append(
            f"Perplexity on {measured['windows']} windows of {measured['length']} tokens of `{measured['source']}`."
        )
    return "\n".join(["## Text", "", *lines]) if lines else ""


def _examples(report: PruningReport) -> str:
    if not report.examples:
        return ""
    lines = [
        f"- *{_plain(example['prompt'])}*"
        + "".join(f"\n  - {state}: {_plain(text)}" for state, text in example.items() if state != "prompt")
        for example in report.examples
    ]
    return "\n".join(["## How the models continue a text", "", *lines])


def _plain(text: str) -> str:
    """What a model has written, quoted, with nothing that Markdown or HTML would read as its own."""
    return re.sub(r"([*_`\[\]~|<>&])", r"\\\1", _quoted(text))


def _quoted(value: Any) -> str:
    """In JSON, which YAML reads, with letters of any script as they are."""
    return json.dumps(value, ensure_ascii=False)


def settings(report: PruningReport) -> str:
    """The settings that differ from the preset's and the defaults, as a configuration file."""
    preset = report.config.get("preset", "balanced")
    usual: dict[str, Any] = asdict(PruningConfig(preset=preset))
    changed = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in report.config.items()
        if name in usual and value != usual[name]
    }
    model = {"pretrained": report.model, **({"dtype": report.dtype} if report.dtype else {})}
    sections = {"model": model, "data": report.data, "pruner": {"preset": preset, **changed}}
    return "\n".join(
        "\n".join([f"{section}:", *(f"  {name}: {_quoted(value)}" for name, value in values.items())])
        for section, values in sections.items()
        if values
    )


def _what_settings(report: PruningReport) -> str:
    if report.mask_check is None:
        return "settings, as a file for `sparsellm prune --config FILE`"
    steps = ", ".join(str(stage["step"]) for stage in report.stages)
    stages = f" in stages at the steps {steps}" if steps else ""
    last = "the last " * bool(steps)
    return f"pruned{stages} and then fine-tuned. Settings of {last}pruning"


def _repeat(report: PruningReport) -> str:
    if not report.config:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(
        [
            "## How",
            "",
            f"[sparsellm_lightning](https://arxiv.org/abs/2402.17946), {_what_settings(report)}"
            f"{' (the text was a dataloader of the caller)' if report.data is None else ''}:",
            "",
            f"```yaml\n{settings(report)}\n```",
            "",
            f"{report.circumstances()}. {report.wall_seconds:.0f} seconds. {versions}.",
        ]
    )
