"""The commands that need no Trainer: verify, inspect and benchmark."""

from __future__ import annotations

from dataclasses import asdict

import torch

from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import add_to_report, inspect_model, measure_speed, read_report, verify_export
from sparsellm_lightning.pipeline import estimate_work
from sparsellm_lightning.reporting import speed_table, structure
from sparsellm_lightning.runtime import format_bytes, gemm_peak


def verify(folder: str, data: TextDataModule | None = None, tolerance: float = 0.01) -> None:
    """Recompute from an export's files what its report says. Exits with status 1 if they differ.

    Args:
        folder: an export (export_dir).
        data: the text on which the report's perplexity was measured. Without it, perplexity is not compared.
        tolerance: largest relative difference of perplexities.
    """
    read_report(folder)  # refused before the text is tokenised
    if data is not None and data.tokenizer is None:
        data.tokenizer = folder
    windows = None if data is None else data.val_dataloader()
    if windows == []:
        raise UserError(
            "verify compares perplexity on the text of data, but it has no evaluation text. Set data.test_files."
        )
    differences = verify_export(folder, windows, tolerance)
    if differences:
        raise UserError(f"{folder} is not what its report says:\n" + "\n".join(differences))
    print(f"{folder} is what its report says.")


def inspect(model: str, pruner: PruningConfig | None = None, sequence_length: int = 512) -> None:
    """Print what would be pruned in a model, and about what that takes on this machine.

    Args:
        model: hub id, folder, GGUF file or package:NAME. A configuration without weights is enough.
        pruner: the settings of the estimate.
        sequence_length: tokens of a calibration window, data.sequence_length of the run.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length must be at least 1, got {sequence_length}. Leave it out for the default.")
    config = pruner or PruningConfig()
    layout = inspect_model(model, config)
    print(structure(layout))
    tokens = config.num_calibration_samples * sequence_length
    expected = estimate_work(layout, config, tokens, sequence_length)
    work = sum(expected.operations.values())
    distillation = f"; distillation {format_bytes(expected.distillation)}" if expected.distillation else ""
    seconds = work / (0.5 * gemm_peak(torch.device("cpu"), torch.float32))
    print(
        f"Preset {config.preset} on {tokens:,} tokens: about {work / 1e12:,.1f} TFLOP ({seconds / 60:,.1f} minutes at half the "
        f"float32 speed of this CPU; allocation, importance and continuations not counted). Memory besides the model: "
        f"{expected.sizes.describe()}{distillation}."
    )


def benchmark(
    model: str, against: str | None = None, prompt_tokens: int = 512, new_tokens: int = 64, repeats: int = 5
) -> None:
    """Print a model's speed and size on this machine, and another model's. An export's report gets them as ``speed``.

    Args:
        model: hub id, folder, GGUF file or package:NAME.
        against: another model, such as the dense one. Both are measured in turn, and their speeds compared pair by pair.
        prompt_tokens: length of the prompt of the prefill.
        new_tokens: number of tokens generated.
        repeats: repetitions, of which medians are shown.
    """
    speeds = measure_speed([name for name in (model, against) if name], prompt_tokens, new_tokens, repeats)
    print(speed_table(speeds))
    add_to_report(model, speed=[asdict(speed) for speed in speeds])
