"""What a run does with its model apart from training, and the report of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from transformers import PreTrainedModel

from sparsellm_lightning.callbacks.figures import log_block, log_settings
from sparsellm_lightning.callbacks.measuring import Measurer, shows_progress
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import TextDataModule, calibration_batches, datamodule_of, run_tokenizer
from sparsellm_lightning.distributed import adapter_for
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import pretrained_of
from sparsellm_lightning.pipeline import prune_model
from sparsellm_lightning.reporting import PruningReport, layer_rows, report_of_sparse
from sparsellm_lightning.runtime import Profile
from sparsellm_lightning.sparsity import SPARSE, filled_by_merge, has_adapters


@dataclass
class Reporter:
    """Prunes and measures the model of one run, and reports it. All ranks call its methods together.

    Args:
        config: the settings; with a schedule, of its last stage.
        schedule: optimizer step -> sparsity. None: one stage.
        resume_dir: folder that keeps the weights of finished blocks.
        measure: whether perplexity is measured.
        baseline: whether SparseGPT is measured too.
        examples: whether the report has continuations of texts.

    Attributes:
        profile: seconds of the measurements.
    """

    config: PruningConfig
    schedule: dict[int, float] | None
    resume_dir: str | None
    measure: bool
    baseline: bool
    examples: bool

    def __post_init__(self) -> None:
        self.profile = Profile()
        self._measurer = Measurer(self.profile)

    def prune(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: PreTrainedModel,
        last: PruningReport | None = None,
    ) -> PruningReport:
        """Prune, and measure before and after.

        Args:
            trainer, pl_module, model: of the run.
            last: report of the stage before, whose zeros are kept. None for the first stage.
        """
        log_settings(trainer, self.config)
        # First of all, because text may be missing or too short.
        batches, sharded, source = calibration_batches(trainer, self.config.num_calibration_samples, self.config.seed)
        before = self._perplexity(trainer, model)
        known = {"dense": before}
        if last is not None:
            before_this = self._measurer.comparable(last)
            known = {name: before_this[name] for name in ("dense", "sparsegpt") if name in before_this}
        elif self.baseline:
            if before is None:
                raise UserError(
                    "baseline compares perplexities, but that of the dense model is not known: there are no validation "
                    "windows, or no language-model head, or it is not finite. Give windows (val_dataloaders, data.test_files), "
                    "or leave baseline out."
                )
            known["sparsegpt"] = self._measurer.sparsegpt(trainer, model, self.config, self._journal("baseline"))
        examples = self._examples(trainer, pl_module, model, "dense") if last is None else last.examples
        stages = [] if last is None else last.stages
        config = self.config
        if self.schedule is not None:
            config = replace(config, sparsity=list(self.schedule.values())[len(stages)])
        report = prune_model(
            model,
            batches,
            config,
            adapter=adapter_for(trainer),
            sharded=sharded,
            keep_zeros=bool(stages),
            resume_dir=self._journal(f"stage-{len(stages)}"),
            progress=shows_progress(trainer),
            on_block=partial(log_block, trainer),
        )
        report.model = pretrained_of(pl_module) or report.model
        if last is not None:
            report.add_stage(last)
        report.calibration["source"] = source
        after = self._perplexity(trainer, model)
        report.evaluation = self._measurer.evaluation
        data = datamodule_of(trainer)
        report.data = data.settings if isinstance(data, TextDataModule) else None
        report.examples = self._examples(trainer, pl_module, model, "pruned", examples)
        report.perplexity = {**known, "pruned": after}
        if self.schedule is not None:
            achieved = report.sparsity["achieved"]
            stage = {"step": trainer.global_step, "sparsity": achieved, "before": before, "after": after}
            report.stages = [*stages, stage]
        return report

    def start_from_sparse(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: PreTrainedModel
    ) -> PruningReport:
        """Report and measure a model that is sparse already.

        Raises:
            UserError: it is not.
        """
        adapter = adapter_for(trainer)
        report = report_of_sparse(adapter.describe(model, self.config), adapter)
        achieved = report.sparsity["achieved"]
        if achieved < SPARSE:
            raise UserError(
                f"weights must name a sparse model, but only {100 * achieved:.2f} % of the projections of "
                f"{pl_module.weights} are zero. To prune this model, give it as pretrained instead."
            )
        report.perplexity["pruned"] = self._perplexity(trainer, model)
        report.evaluation = self._measurer.evaluation
        report.examples = self._examples(trainer, pl_module, model, "pruned")
        return report

    def add_finetuning(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: PreTrainedModel, report: PruningReport
    ) -> None:
        """Report the weights and perplexity after fine-tuning."""
        adapter = adapter_for(trainer)
        finetuned = self._perplexity(trainer, model)
        report.perplexity = {**self._measurer.comparable(report), "finetuned": finetuned}
        report.evaluation = self._measurer.evaluation or report.evaluation
        report.examples = self._examples(trainer, pl_module, model, "finetuned", report.examples)
        errors = {layer["name"]: layer["error"] for layer in report.layers}
        filled = filled_by_merge(model) if has_adapters(model) else set()
        layout = adapter.describe(model, self.config)
        report.layers, report.sparsity["achieved"] = layer_rows(layout, adapter, errors, filled)

    def _journal(self, name: str) -> Path | None:
        """A folder inside ``resume_dir``."""
        return None if self.resume_dir is None else Path(self.resume_dir) / name

    def _perplexity(self, trainer: pl.Trainer, model: PreTrainedModel) -> float | None:
        return self._measurer.perplexity(trainer, model) if self.measure else None

    def _examples(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: PreTrainedModel,
        state: str,
        known: Sequence[dict[str, str]] = (),
    ) -> list[dict[str, str]]:
        """See :meth:`Measurer.examples`."""
        if not self.examples:
            return []
        tokenizer = run_tokenizer(datamodule_of(trainer), pl_module)
        return self._measurer.examples(trainer, model, tokenizer, state, known)
