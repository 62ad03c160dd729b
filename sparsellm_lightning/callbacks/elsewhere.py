"""Keeping zeros under Hugging Face's Trainer, and the trainers that derive from it (TRL)."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import TrainerCallback

from sparsellm_lightning.errors import MaskError, UserError
from sparsellm_lightning.sparsity import holding_zeros


class KeepZeros(TrainerCallback):
    """Keep the zeros of a sparse model that ``transformers.Trainer`` or TRL's ``SFTTrainer`` trains.

    ``Trainer(model, ..., callbacks=[KeepZeros()])``. See :func:`~sparsellm_lightning.holding_zeros`, which it enters when
    training begins, and leaves when it ends. A training that an exception ends leaves its hooks on the model; to be free of
    them, run ``trainer.train()`` inside ``holding_zeros(model)`` instead of using the callback.

    Raises:
        UserError: under DeepSpeed or FSDP, or see :func:`~sparsellm_lightning.holding_zeros`.
        MaskError: at the end of training, if the zeros changed.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):  # of accelerate's configuration
            raise UserError("KeepZeros does not reach DeepSpeed's copies of the weights. Leave deepspeed out.")
        assert model is not None
        sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
        if sharded or getattr(args, "fsdp", None):  # accelerate's configuration shards without the argument
            raise UserError(
                "KeepZeros needs whole weights, which FSDP shards. Leave fsdp out, or use SparseFinetuning."
            )
        with suppress(MaskError):  # of a training that an exception ended, whose model may have other weights by now
            self._held.close()
        self._held.enter_context(holding_zeros(model))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._held.close()
