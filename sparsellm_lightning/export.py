"""Writing a pruned model as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.errors import UserError


def check_export_dir(export_dir: str | Path, overwrite: bool) -> None:
    """Refuse a folder that already holds something, before any long work.

    Raises:
        UserError: it is not empty and ``overwrite`` is false, or it is a file.
    """
    path = Path(export_dir)
    if path.is_file():
        raise UserError(f"export_dir must be a folder, got the file {export_dir}. Choose another name.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(
            f"export_dir must be empty, but {export_dir} holds {len(list(path.iterdir()))} entries. "
            "Choose another folder, or set overwrite to true (its contents are then replaced)."
        )


def export_model(
    model: PreTrainedModel,
    export_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write config, safetensors and tokenizer, loadable by ``AutoModelForCausalLM.from_pretrained`` alone.

    Written beside the target first and renamed into place, so that an interrupted export leaves no half folder.

    Raises:
        UserError: see :func:`check_export_dir`.
    """
    check_export_dir(export_dir, overwrite)
    target = Path(export_dir)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target
