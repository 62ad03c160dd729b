"""Writing a pruned model as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.sparsity import has_adapters, merged_state


def check_export_dir(export_dir: str | Path, overwrite: bool) -> None:
    """Refuse an export folder that is not empty, before any long work.

    Raises:
        UserError: the folder is not empty and ``overwrite`` is false, or it is a file.
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
    state_dict: dict[str, Tensor] | None = None,
) -> Path:
    """Write config, safetensors and tokenizer, for ``AutoModelForCausalLM.from_pretrained``.

    LoRA adapters are merged, with the zeros kept. The folder is written beside the target and renamed into place, so that an
    interrupted export leaves no incomplete folder.

    Args:
        model: to write.
        export_dir: target folder.
        tokenizer: written into the folder. None: no tokenizer.
        overwrite: replace the contents of the folder.
        state_dict: whole weights of a model that is sharded over ranks. None: the model's own.

    Raises:
        UserError: see :func:`check_export_dir`.
    """
    check_export_dir(export_dir, overwrite)
    target = Path(export_dir)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if has_adapters(model):
        state_dict = merged_state(model, model.state_dict() if state_dict is None else state_dict)
    if state_dict is not None:
        model = _unsharded(model, state_dict)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return target


def _unsharded(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> PreTrainedModel:
    """A plain model of the same class and configuration with whole weights."""
    # FSDP2 changes the class of a sharded module to one that derives from the model's.
    plain: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    with torch.device("meta"):
        whole: PreTrainedModel = plain(model.config)
    whole.load_state_dict(state_dict, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole
