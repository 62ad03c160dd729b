"""The pruning callback: it decides when. ``Reporter`` prunes and measures, ``Exporter`` writes."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import find_model
from sparsellm_lightning.callbacks.checks import (
    check_launcher,
    check_learning_rate,
    check_read_again,
    check_resume_dir,
    check_resumed,
    check_together,
    check_trainer,
)
from sparsellm_lightning.callbacks.exporting import Exporter
from sparsellm_lightning.callbacks.figures import log_results
from sparsellm_lightning.callbacks.finetuning import AVERAGING, SparseFinetuning, kept_layers, renew_averages, resumed
from sparsellm_lightning.callbacks.interruptions import allow_checkpoints, ending_on_sigterm, forbid_checkpoints
from sparsellm_lightning.callbacks.reports import Reporter
from sparsellm_lightning.callbacks.schedule import check_run, check_schedule, warn_of_late_stages
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.distributed import adapter_for
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import is_sparse_already, keep_in_conversions, pretrained_of, stop_keeping
from sparsellm_lightning.reporting import PruningReport, layer_rows
from sparsellm_lightning.sparsity import has_adapters, left_out_biases, maskable_adapters, pruned_before

log = logging.getLogger(__name__)


class SparseLLMCallback(SparseFinetuning):
    """Prune the causal language model inside a LightningModule, once, when training starts.

    Calibration windows come from the datamodule's ``calibration_dataloader()`` if it has one (called with ``num_samples`` and
    ``seed`` if it takes them), otherwise from the training dataloader. A run that resumes from a checkpoint taken after
    pruning does not prune again, nor does a second ``fit`` with the same model.

    With ``finetune`` the run trains on and keeps the zeros (:class:`~sparsellm_lightning.SparseFinetuning`).
    ``CausalLM(weights=...)``, which names a sparse model, is trained and not pruned.

    Args:
        finetune: train on after pruning. False: the run stops.
        schedule: gradual pruning: optimizer step -> sparsity, such as ``{0: 0.5, 50: 0.6, 100: 0.7}``. Every stage solves
            anew, takes the model as trained so far for the dense one, and keeps the zeros of the stage before. Needs
            ``finetune``. Replaces ``sparsity``.
        export_dir: folder for the Hugging Face model and ``pruning_report.json``, written when the run ends. None: no export.
        resume_dir: folder that keeps the weights of finished blocks, in ``stage-N`` for stage N = 0, 1, ... of ``schedule``,
            and in ``baseline``.
            A run that was killed while pruning and is started again goes on at the first unfinished block. None: none kept.
        overwrite: replace an earlier export in ``export_dir``.
        pack: export files without the zeros, which only :func:`~sparsellm_lightning.load_model` reads (format:
            :mod:`sparsellm_lightning.models.packed`).
        push_to_hub: id of the repository on the Hugging Face hub to which the export is uploaded. A repository that does not
            exist is made, as a private one. Needs ``export_dir``. Not possible with ``pack``. None: no upload.
        measure: measure perplexity on the validation windows, if there are any, before and after pruning and fine-tuning.
        baseline: first prune the model by SparseGPT alone, and report R, the loss ``ln(perplexity / dense)`` as a share of
            SparseGPT's. Needs ``measure``, validation windows, and a pattern that is unstructured or N:M. The dense weights are
            kept in host memory meanwhile.
        model_attribute: attribute of the LightningModule that holds the model, if it holds several.
        settings: the fields of :class:`~sparsellm_lightning.PruningConfig`.

    Attributes:
        config: the settings.
        report: measurements of the last pruning. None before.

    Raises:
        UserError: a setting out of its range, at construction; a Trainer under which nothing would run, an export folder that
            is not empty or an unknown architecture, before any long work.
    """

    def __init__(
        self,
        *,
        finetune: bool = False,
        schedule: dict[int, float] | None = None,
        export_dir: str | None = None,
        resume_dir: str | None = None,
        overwrite: bool = False,
        pack: bool = False,
        push_to_hub: str | None = None,
        measure: bool = True,
        baseline: bool = False,
        model_attribute: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.config = PruningConfig(**settings)
        self.schedule = None if schedule is None else check_schedule(schedule, self.config, finetune)
        if self.schedule is not None:
            self.config = replace(self.config, sparsity=list(self.schedule.values())[-1])
        self.finetune = finetune
        self.export_dir = None if export_dir is None else str(Path(export_dir).expanduser().absolute())
        self.resume_dir = None if resume_dir is None else str(Path(resume_dir).expanduser().absolute())
        self.overwrite = overwrite
        self.pack = pack
        self.push_to_hub = push_to_hub
        self.measure = measure
        self.baseline = baseline
        check_together(self.config, measure, baseline, pack, push_to_hub)
        self.model_attribute = model_attribute
        self.report: PruningReport | None = None
        self._restored = False  # whether the report comes from the checkpoint of this run
        self._trained = False  # whether this fit has begun to train
        self._pruned_model: weakref.ref[PreTrainedModel] | None = None
        self._reporter: Reporter  # from setup
        self._exporter: Exporter | None = None  # from setup, if there is an export_dir

    def __getstate__(self) -> dict[str, Any]:
        pruned = self._pruned_model and self._pruned_model()
        return super().__getstate__() | {"_pruned_model": pruned, "_exporter": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pruned_model = state["_pruned_model"] and weakref.ref(state["_pruned_model"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        allow_checkpoints(trainer)
        keep_in_conversions(trainer.precision_plugin)
        if stage != "fit":
            return
        self._restored = self._trained = False
        self._reporter = Reporter(
            self.config,
            self.schedule,
            self.resume_dir,
            measure=self.measure,
            baseline=self.baseline,
            examples=self.measure and self.export_dir is not None,  # without an export nobody reads them
        )
        if is_sparse_already(pl_module) and (self.schedule is not None or self.baseline):
            name = "baseline" if self.schedule is None else "schedule"
            raise UserError(
                f"weights names a sparse model, which is not pruned, but {name} asks for pruning. Leave one out."
            )
        tunes = self.config.tunes and not is_sparse_already(pl_module)
        check_trainer(trainer, self._trains_on(pl_module), tunes=tunes)
        check_launcher(trainer, pl_module, self.export_dir)
        tries = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.schedule is not None and not tries:
            check_run(trainer, self.schedule)
        if self.push_to_hub is not None and self.export_dir is None:
            raise UserError("push_to_hub uploads an export, but export_dir is not set. Set it.")
        if self.export_dir is not None and tries:
            rank_zero_warn("fast_dev_run prunes, but exports nothing.")
        elif self.export_dir is not None:
            self._exporter = Exporter(self.export_dir, self.overwrite, self.pack, self.push_to_hub)
            self._exporter.claim(trainer, self.resume_dir)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layout = adapter_for(trainer).describe(self._model(pl_module), self.config)
        # The report of a checkpoint is restored later. Pruning checks again.
        if resumed(trainer) is None and not self._has_pruned(pl_module) and not is_sparse_already(pl_module):
            adapter_for(trainer).check(layout)
            if self.resume_dir is not None:
                check_resume_dir(trainer, self.resume_dir)
        if self._exporter is not None:
            self._exporter.check(pl_module, layout, self.config)
        if self._trains_on(pl_module):
            maskable_adapters(pl_module, {p.module for p in layout.projections() if p.pruned})
        if self.schedule is not None and has_adapters(pl_module):
            raise UserError(
                "Gradual pruning solves for weights that LoRA adapters would shift. Leave out schedule or lora."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = True
        model = self._model(pl_module)
        if not (self._restored or self._is_pruned(trainer, pl_module)):
            self.report = None  # of an earlier run, with another model or before dense weights were loaded
        if self.report is not None:
            if self.schedule is None:  # its stages have their own
                check_resumed(self.report, self.config)
            if trainer.is_global_zero:
                log.info("This model is pruned already. It is not pruned again.")
            self._hold(trainer, pl_module)
        elif is_sparse_already(pl_module):
            self.report = self._reporter.start_from_sparse(trainer, pl_module, model)
            self._hold(trainer, pl_module)
        else:
            if self.schedule is not None:
                warn_of_late_stages(trainer, self.schedule)
            if self.finetune:
                check_read_again(trainer, "training")
                check_learning_rate(trainer)
            elif self.baseline:
                check_read_again(trainer, "the baseline")
            self._prune(trainer, pl_module)
        assert self.report is not None
        self.report.model = pretrained_of(pl_module) or self.report.model
        self._pruned_model = weakref.ref(model)
        if not self._trains_on(pl_module):
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.schedule is None or self.report is None or len(self.report.stages) == len(self.schedule):
            return
        if trainer.global_step >= list(self.schedule)[len(self.report.stages)]:
            self._prune(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.report is None:
            return
        left = list(self.schedule or {})[len(self.report.stages) :]
        if left:
            rank_zero_warn(
                f"The run ended at step {trainer.global_step}, before the schedule's stages at {', '.join(map(str, left))}. "
                "Train longer, or prune earlier."
            )
        if self._trains_on(pl_module):
            zeros = self._zeros
            self.report.mask_check = {"checks": self.checks, "layers": len(zeros), "zeros": sum(zeros.values())}
            self._reporter.add_finetuning(trainer, pl_module, self._model(pl_module), self.report)
        self.report.phases |= self._reporter.profile.seconds
        try:
            if self._exporter is not None:
                self._exporter.write(trainer, pl_module, self._model(pl_module), self.config, self.report)
        finally:  # behind the export, which a logger that fails must not prevent
            log_results(trainer, self.report)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a run whose checkpoint is of its last step: Lightning does not train, and calls no other hook.

        Raises:
            UserError: another run that has not trained, nor pruned.
        """
        if self._trained or (self._has_pruned(pl_module) and not self._restored):
            return
        if not self._restored:
            self.report = None
            raise UserError(
                "SparseLLMCallback prunes when training starts, but nothing has run: the Trainer or ckpt_path has reached its "
                "max_steps or max_epochs before, or the dataloader has no batches. Use a new Trainer, raise the limits, or "
                "give more text."
            )
        moved = not adapter_for(trainer).weights_are_split  # to the CPU
        if moved:
            pl_module.to(trainer.strategy.root_device)
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:  # type: ignore[attr-defined]
            if isinstance(callback, AVERAGING):
                callback.on_train_end(trainer, pl_module)
        self.on_train_start(trainer, pl_module)
        self.on_train_end(trainer, pl_module)
        if moved:
            pl_module.cpu()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        stop_keeping(trainer.precision_plugin)
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        stop_keeping(trainer.precision_plugin)
        self._release()

    def state_dict(self) -> dict[str, Any]:
        report = None if self.report is None else self.report.to_dict()
        return super().state_dict() | {"report": report}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not self._resumes:
            return
        report = state_dict["report"]
        self.report = None if report is None else PruningReport(**report)
        self._restored = True

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, or prune further, and hold the zeros."""
        forbid_checkpoints(trainer)
        with ending_on_sigterm():
            try:
                self.report = self._reporter.prune(trainer, pl_module, self._model(pl_module), self.report)
            except (KeyboardInterrupt, SystemExit):
                kept = "No finished block was kept. To be able to go on, set resume_dir."
                if self.resume_dir is not None:
                    kept = f"Finished blocks are in {self.resume_dir}. Start the same command again to go on."
                log.warning("Pruning was interrupted. %s", kept)
                raise
        allow_checkpoints(trainer)
        renew_averages(trainer.callbacks, pl_module)  # type: ignore[attr-defined]  # which are of the dense model
        self._hold(trainer, pl_module)

    def _release(self) -> None:
        """Leave the export folder to other runs."""
        if self._exporter is not None:
            self._exporter.release()
        self._exporter = None

    def _hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._trains_on(pl_module):
            return
        adapter = adapter_for(trainer)
        layout = adapter.describe(self._model(pl_module), self.config)
        held = [p for p in layout.projections() if p.pruned]
        known = {id(p.parameter) for p in held}
        held += pruned_before([p for p in layout.projections() if id(p.parameter) not in known], adapter)
        if "blocks" in self.config.removes:
            held += left_out_biases(layout, adapter)
        if is_sparse_already(pl_module):  # whose zeros may be in other layers too
            held = kept_layers(trainer, pl_module, held)
        self.hold(trainer, pl_module, held)

    def _has_pruned(self, pl_module: pl.LightningModule) -> bool:
        """Whether an earlier fit has pruned this model."""
        return self._pruned_model is not None and self._pruned_model() is self._model(pl_module)

    def _is_pruned(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether an earlier fit has pruned this model, and it still has most of these zeros."""
        if self.report is None or not self._has_pruned(pl_module):
            return False
        adapter = adapter_for(trainer)
        _, achieved = layer_rows(adapter.describe(self._model(pl_module), self.config), adapter)
        return achieved >= 0.5 * self.report.sparsity["achieved"]

    def _trains_on(self, pl_module: pl.LightningModule) -> bool:
        return self.finetune or is_sparse_already(pl_module)

    def _model(self, pl_module: pl.LightningModule) -> PreTrainedModel:
        return find_model(pl_module, self.model_attribute)
