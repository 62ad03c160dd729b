"""The Lightning callback: says when to prune; everything else lives in its own module."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DistributedSampler
from transformers import PreTrainedModel

from sparsellm_lightning.architectures import describe, find_model
from sparsellm_lightning.config import LocalSolver, Method, PruningConfig, Target
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.evaluate import perplexity
from sparsellm_lightning.export import check_export_dir, export_model
from sparsellm_lightning.masks import Masks
from sparsellm_lightning.pruning import prune_model
from sparsellm_lightning.report import PruningReport, layer_rows
from sparsellm_lightning.strategies import StrategyAdapter, adapter_for

log = logging.getLogger(__name__)


class SparseLLMCallback(pl.Callback):
    """Prune the causal language model inside a LightningModule, once, when training starts.

    Calibration windows come from the datamodule's ``calibration_dataloader()`` when it has one (called with
    ``num_samples`` and ``seed`` if it takes them), otherwise from the training dataloader. A run resumed from a checkpoint
    taken after pruning does not prune again. See :class:`~sparsellm_lightning.config.PruningConfig` for the settings.

    Args:
        sparsity: fraction of zeros in every pruned matrix, in [0, 1). None is 0.5, or what an N:M pattern implies.
        pattern: ``unstructured``, or N:M written kept:group: ``2:4``, ``4:8``, ``1:4``.
        method: ``sparsellm``, ``sparsegpt``, ``wanda`` or ``magnitude``.
        local_solver: what ``sparsellm`` uses for attention and inside its alternation.
        global_blocks: blocks whose feed-forward the alternation solves: ``all``, ``none``, ``first_half`` or indices.
        num_iterations: iterations of the alternation; the first is the local solver.
        alpha: weight of the pre-activation terms.
        beta: weight of the output term.
        gamma: weight of the activation term.
        scale_free: measure each term by the mean square of its target. False is the paper's raw objective.
        damping: added to Gram diagonals, as a fraction of their mean.
        block_size: columns per step of the SparseGPT sweep.
        num_calibration_samples: calibration windows, over all ranks.
        target: ``block`` or ``model``: what the alternation fits.
        skip: name patterns of projections left dense.
        finetune: train on after pruning, with the zeros held; otherwise the run stops.
        export_dir: folder for the Hugging Face model and ``pruning_report.json``, written when the run ends.
        overwrite: replace what ``export_dir`` already holds.
        measure: perplexity on the validation windows before and after pruning, where there are any.
        model_attribute: attribute of the LightningModule that holds the model, where it holds several.
        seed: seeds the choice of calibration windows.

    Raises:
        UserError: (a ``ValueError``) for each setting out of its range, at construction; for a Trainer under which nothing
            would run, an export folder that is not empty, an unknown architecture, before any long work.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        method: Method = "sparsellm",
        local_solver: LocalSolver = "sparsegpt",
        global_blocks: str | list[int] = "all",
        num_iterations: int = 4,
        alpha: float = 1.0,
        beta: float = 10.0,
        gamma: float = 1.0,
        scale_free: bool = True,
        damping: float = 0.01,
        block_size: int = 128,
        num_calibration_samples: int = 128,
        target: Target = "block",
        skip: Sequence[str] = (),
        finetune: bool = False,
        export_dir: str | None = None,
        overwrite: bool = False,
        measure: bool = True,
        model_attribute: str | None = None,
        seed: int = 0,
    ) -> None:
        self.config = PruningConfig(
            sparsity=sparsity,
            pattern=pattern,
            method=method,
            local_solver=local_solver,
            global_blocks=global_blocks,
            num_iterations=num_iterations,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            scale_free=scale_free,
            damping=damping,
            block_size=block_size,
            num_calibration_samples=num_calibration_samples,
            target=target,
            skip=tuple(skip) if not isinstance(skip, str) else skip,
            seed=seed,
        )
        self.finetune = finetune
        self.export_dir = export_dir
        self.overwrite = overwrite
        self.measure = measure
        self.model_attribute = model_attribute
        self.report: PruningReport | None = None
        self._masks: Masks | None = None

    @property
    def pruned(self) -> bool:
        """Whether this run, or the one it resumes, has pruned."""
        return self.report is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.max_steps == 0 or trainer.max_epochs == 0 or trainer.limit_train_batches == 0:
            raise UserError(
                "SparseLLMCallback prunes when training starts, but nothing would run: max_steps, max_epochs and "
                f"limit_train_batches must not be 0, got {trainer.max_steps}, {trainer.max_epochs} and "
                f"{trainer.limit_train_batches}. To prune only, leave them alone and set finetune to false."
            )
        if not self.finetune and (trainer.min_steps or trainer.min_epochs):
            raise UserError(
                "With finetune=False the run stops after pruning, but min_steps / min_epochs ask for "
                f"{trainer.min_steps} / {trainer.min_epochs}. Leave them out, or set finetune to true."
            )
        adapter_for(trainer)
        if self.export_dir is not None and trainer.is_global_zero:
            check_export_dir(self.export_dir, self.overwrite)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        describe(self._model(pl_module), self.config)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = self._model(pl_module)
        if self.pruned:
            if trainer.is_global_zero:
                log.info("This run resumes one that has pruned; not pruning again.")
        else:
            adapter = adapter_for(trainer)
            dense = self._perplexity(trainer, model, adapter)
            batches, sharded = self._calibration_batches(trainer)
            self.report = prune_model(
                model,
                batches,
                self.config,
                adapter=adapter,
                sharded=sharded,
                progress=trainer.progress_bar_callback is not None,
                on_iteration=lambda block, iteration, error: self._log(trainer, block, iteration, error),
            )
            self.report.model = getattr(pl_module, "pretrained", self.report.model)
            self.report.perplexity = {"dense": dense, "pruned": self._perplexity(trainer, model, adapter)}
        if self.finetune:
            self._masks = Masks(describe(model, self.config))
        else:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._masks is not None:
            self._masks.apply()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.report is None:
            return
        model, adapter = self._model(pl_module), adapter_for(trainer)
        if self.finetune:
            self.report.perplexity["finetuned"] = self._perplexity(trainer, model, adapter)
            # What is reported is counted in the weights that are written.
            errors = {layer["name"]: layer["error"] for layer in self.report.layers}
            self.report.layers, self.report.sparsity["achieved"] = layer_rows(
                describe(model, self.config), adapter, errors
            )
        if self.export_dir is not None:
            state = adapter.state_dict(model)
            if trainer.is_global_zero:
                tokenizer = getattr(pl_module, "tokenizer", None)
                self.report.save(export_model(model, self.export_dir, tokenizer, self.overwrite, state))
            trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {"report": None if self.report is None else self.report.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        report = state_dict["report"]
        self.report = None if report is None else PruningReport(**report)

    def _model(self, pl_module: pl.LightningModule) -> PreTrainedModel:
        return find_model(pl_module, self.model_attribute)

    def _calibration_batches(self, trainer: pl.Trainer) -> tuple[Iterable[Any], bool]:
        """The calibration stream, and whether it is already split over ranks."""
        source = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
        if source is None:
            assert trainer.train_dataloader is not None
            return trainer.train_dataloader, _is_sharded(trainer.train_dataloader)
        wanted = {"num_samples": self.config.num_calibration_samples, "seed": self.config.seed}
        accepted = inspect.signature(source).parameters
        return source(**{name: value for name, value in wanted.items() if name in accepted}), False

    def _perplexity(self, trainer: pl.Trainer, model: PreTrainedModel, adapter: StrategyAdapter) -> float | None:
        """On the validation windows; None where there are none or the model has no language-model head."""
        if not self.measure or model.get_output_embeddings() is None:
            return None
        batches, sharded = _validation_batches(trainer)
        return None if batches is None else perplexity(model, batches, adapter, sharded=sharded)

    @staticmethod
    def _log(trainer: pl.Trainer, block: int, iteration: int, error: float) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"prune/block_{block:03d}_error": error}, step=iteration)


def _is_sharded(loader: Any) -> bool:
    """Whether a dataloader gives each rank its own share, as Lightning's distributed sampler makes it do."""
    if isinstance(loader, (list, tuple)):
        return any(_is_sharded(part) for part in loader)
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def _validation_batches(trainer: pl.Trainer) -> tuple[Iterable[Any] | None, bool]:
    """The validation batches, if there are any, and whether each rank's loader holds only its own share."""
    for owner in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
        if owner is not None and is_overridden("val_dataloader", owner):
            loaders, sharded = owner.val_dataloader(), False
            break
    else:
        loaders = trainer.val_dataloaders
        sharded = _is_sharded(loaders)
    if isinstance(loaders, (list, tuple)):
        return (chain.from_iterable(loaders), sharded) if loaders else (None, sharded)
    return loaders, sharded
