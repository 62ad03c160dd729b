"""``sparsellm sweep``: many sparsities and methods on one model, into a table, a curve and a page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.architecture import describe
from sparsellm_lightning.config import PRESETS, Method, PruningConfig
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import load_model, load_tokenizer, perplexity, replace_text
from sparsellm_lightning.pipeline import prune_model
from sparsellm_lightning.reporting import format_table, save_sweep, versions
from sparsellm_lightning.runtime import claimed, showing, to_best_device

TABLE, SETTINGS = "sweep.csv", "sweep.json"


@dataclass(frozen=True)
class Row:
    """A model of the sweep.

    Args:
        variant: preset or method; ``dense`` for the model itself.
        sparsity: that was asked for.
        achieved: fraction of zeros in the projections.
        perplexity: on the evaluation windows.
        gap: ``ln(perplexity / dense)``.
        seconds: of pruning.
        r: the gap as a share of SparseGPT's at this sparsity. NaN without the variant ``sparsegpt``.
    """

    variant: str
    sparsity: float
    achieved: float
    perplexity: float
    gap: float
    seconds: float
    r: float = math.nan


def sweep(
    model: str,
    sparsities: list[float] | None = None,
    variants: list[str] | None = None,
    out: str = "outputs/sweep",
    data: TextDataModule | None = None,
    settings: dict[str, Any] | None = None,
    pattern: str = "unstructured",
) -> list[Row]:
    """Prune a model to several sparsities by several presets or methods, and compare perplexities.

    The model is loaded, the text tokenised and the dense model measured once. After every run ``sweep.csv`` is written: the
    same command goes on where it was stopped. At the end ``sweep.html`` shows the table and, with the extra ``plots``, the
    curve. Pruned models are not kept.

    Args:
        model: hub id, folder, GGUF file or package:NAME.
        sparsities: None: [0.5, 0.6, 0.7, 0.8], or that of an N:M pattern.
        variants: presets, or methods alone, such as [balanced, sparsegpt]. None: balanced.
        out: folder of the table, the curve and the page.
        data: calibration and evaluation text.
        settings: further settings of the pruner, for all runs.
        pattern: of the pruner, for all runs: unstructured, N:M, neurons, heads or blocks.

    Returns:
        the rows of the table, the dense model first.

    Raises:
        UserError: a setting out of its range, no evaluation text, or a folder with the table of another sweep.
    """
    data = data or TextDataModule()
    if sparsities is None:
        sparsities = [PruningConfig(pattern=pattern).requested_sparsity] if ":" in pattern else [0.5, 0.6, 0.7, 0.8]
    configs = {
        (variant, sparsity): _config(variant, sparsity, pattern, settings or {})
        for variant in variants or ["balanced"]
        for sparsity in sparsities
    }
    if data.source == "self":
        raise UserError(
            "sweep prunes one model many times, but windows of source self are written in a Trainer's fit. Set another source."
        )
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out must be a folder, but {out} is a file. Choose another name.")
    if not isinstance(data.tokenizer, PreTrainedTokenizerBase):
        data.tokenizer = load_tokenizer(data.tokenizer or model)
    with claimed(folder, "out"):
        rows = _known(folder, _identity(model, data, {**(settings or {}), "pattern": pattern}))
        evaluation = data.val_dataloader()
        if isinstance(evaluation, list):
            raise UserError("sweep compares perplexities, but there is no evaluation text. Set data.test_files.")
        data.calibration_dataloader(1)  # refuses what is missing
        loaded = load_model(model).eval()
        to_best_device(loaded)
        for config in configs.values():
            describe(loaded, config)
        dense = {name: tensor.to("cpu", copy=True) for name, tensor in loaded.state_dict().items()}
        with showing(True):
            if ("dense", 0.0) not in rows:
                value = perplexity(loaded, evaluation)
                rows["dense", 0.0] = Row("dense", 0.0, 0.0, value, 0.0, 0.0)
            for key, config in configs.items():
                if key not in rows:
                    loaded.load_state_dict(dense)
                    rows[key] = _run(loaded, data, evaluation, config, *key, rows["dense", 0.0].perplexity)
                    _write(folder, rows)
        rows = _write(folder, rows)
        chosen = [rows["dense", 0.0], *(rows[key] for key in configs)]
        save_sweep(model, [vars(row) for row in chosen], folder)
    print(format_table([_NAMES, *(_cells(row) for row in chosen)]))
    print(f"\nwritten to {folder}")
    return chosen


_NAMES = tuple(field.name for field in fields(Row))


def _config(variant: str, sparsity: float, pattern: str, settings: dict[str, Any]) -> PruningConfig:
    if variant not in (*PRESETS, *get_args(Method)):
        raise UserError(
            f"variants must be presets or methods, got {variant}. Choose among {', '.join((*PRESETS, *get_args(Method)))}."
        )
    chosen: dict[str, Any] = {"preset": variant} if variant in PRESETS else {"preset": "paper", "method": variant}
    chosen |= {"sparsity": sparsity, "pattern": pattern}
    unknown = set(settings) - {field.name for field in fields(PruningConfig)}
    if unknown:
        raise UserError(f"settings must be those of the pruner, got {', '.join(sorted(unknown))}. Correct the names.")
    twice = sorted(set(settings) & set(chosen))
    if twice:
        raise UserError(f"settings must leave {', '.join(twice)} to variants, sparsities and pattern. Leave it out.")
    try:
        return PruningConfig(**settings, **chosen)
    except (TypeError, AttributeError) as error:  # no parser has seen their types
        raise UserError(
            f"settings must have the types of the pruner's, got {settings}: {error}. Correct it."
        ) from error


def _run(
    model: PreTrainedModel,
    data: TextDataModule,
    evaluation: Iterable[Any],
    config: PruningConfig,
    variant: str,
    sparsity: float,
    dense: float,
) -> Row:
    windows = data.calibration_dataloader(config.num_calibration_samples, config.seed)
    report = prune_model(model, windows, config, progress=True)
    found = perplexity(model, evaluation)
    return Row(
        variant, sparsity, report.sparsity["achieved"], found, math.log(found / dense), round(report.wall_seconds, 1)
    )


def _identity(model: str, data: TextDataModule, settings: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a table have in common."""
    others = ("batch_size", "num_workers", "train_files", "test_files")
    text: dict[str, Any] = {name: value for name, value in data.settings.items() if name not in others}
    text["files"] = {split: [str(path.resolve()) for path in paths] for split, paths in data.texts.files.items()}
    text["tokenizer"] = getattr(data.tokenizer, "name_or_path", "")
    source = Path(model).expanduser()
    files = [*(path for paths in data.texts.files.values() for path in paths), *([source] if source.is_file() else [])]
    files += sorted(path for path in source.glob("*") if _of_model(path)) if source.is_dir() else []
    stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()}
    return {"model": model, "data": text, "settings": settings, "changed": stamps, "versions": versions()}


def _of_model(path: Path) -> bool:
    """Whether a file of a folder decides what the model computes: not reports, nor what a sweep writes."""
    weights = path.suffix in (".safetensors", ".bin", ".gguf", ".model")
    return weights or path.name in ("config.json", "tokenizer.json", "tokenizer_config.json")


def _known(folder: Path, identity: dict[str, Any]) -> dict[tuple[str, float], Row]:
    """The rows that an earlier run of this sweep has written. The folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not (folder / TABLE).exists():  # a run that measured nothing claims nothing
        path.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        return {}
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(identity)):
        raise UserError(
            f"out must be the folder of this sweep, but {path} is missing, or of another model, text, settings or versions. "
            "Change out."
        )
    with (folder / TABLE).open(newline="") as file:
        read = [Row(row["variant"], *(float(row[name]) for name in _NAMES[1:])) for row in csv.DictReader(file)]
    return {(row.variant, row.sparsity): row for row in read}


def _write(folder: Path, rows: dict[tuple[str, float], Row]) -> dict[tuple[str, float], Row]:
    """Write the table. Returns its rows, with R where SparseGPT's gap is known."""
    gaps = {row.sparsity: row.gap for row in rows.values() if row.variant == "sparsegpt" and 0 < row.gap < math.inf}
    rows = {key: replace(row, r=row.gap / gaps.get(row.sparsity, math.nan)) for key, row in rows.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_NAMES)
    writer.writerows([list(vars(row).values()) for row in rows.values()])
    replace_text(folder / TABLE, text.getvalue())
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.variant,
        f"{100 * row.sparsity:g} %",
        f"{100 * row.achieved:.2f} %",
        f"{row.perplexity:.2f}",
        f"{row.gap:.3f}",
        f"{row.seconds:.0f}",
        "" if math.isnan(row.r) else f"{row.r:.2f}",
    )
