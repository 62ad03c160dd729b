"""The Lightning callback: says when to prune; everything else lives in its own module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from sparsellm_lightning.architectures import describe, find_model
from sparsellm_lightning.config import (
    Allocation,
    AutoOrNumber,
    LocalSolver,
    Method,
    Precision,
    PruningConfig,
    Quality,
    Reconstruction,
    Refine,
    Target,
)
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.evaluate import perplexity
from sparsellm_lightning.export import check_export_dir, export_model
from sparsellm_lightning.finetuning import SparseFinetuning
from sparsellm_lightning.lora import has_adapters
from sparsellm_lightning.pruning import prune_model
from sparsellm_lightning.report import PruningReport, layer_rows, report_of_sparse
from sparsellm_lightning.stopwatch import Stopwatch
from sparsellm_lightning.strategies import StrategyAdapter, adapter_for
from sparsellm_lightning.trainer_data import calibration_batches, validation_batches

log = logging.getLogger(__name__)


class SparseLLMCallback(SparseFinetuning):
    """Prune the causal language model inside a LightningModule, once, when training starts.

    Calibration windows come from the datamodule's ``calibration_dataloader()`` when it has one (called with
    ``num_samples`` and ``seed`` if it takes them), otherwise from the training dataloader. A run resumed from a checkpoint
    taken after pruning does not prune again. See :class:`~sparsellm_lightning.config.PruningConfig` for the settings.

    With ``finetune`` the run trains on, the zeros kept as :class:`~sparsellm_lightning.finetuning.SparseFinetuning` does. A
    module whose ``weights`` attribute names an already sparse model (``CausalLM(weights=...)``) is not pruned, only trained.

    Args:
        sparsity: fraction of zeros in every pruned matrix, in [0, 1). None is 0.5, or what an N:M pattern implies.
        pattern: ``unstructured``, or N:M written kept:group: ``2:4``, ``4:8``, ``1:4``.
        quality: ``fast``, ``balanced`` or ``best``: presets of the settings from ``method`` to ``damping``, any of which
            may be given all the same. None is the paper's method.
        method: ``sparsellm``, ``admm``, ``sparsegpt``, ``wanda`` or ``magnitude``.
        local_solver: what ``sparsellm`` uses for attention and inside its alternation.
        num_iterations: iterations of the alternation; the first is the local solver.
        target: ``block`` or ``model``: what alternation and reconstruction fit.
        allocation: ``uniform``, ``owl``, ``atp`` or ``error``: how the sparsity is spread over the model.
        refine: ``none``, ``weights`` or ``mask``: what follows the local solver.
        reconstruct: tune each block's kept weights by gradient: steps, learning rate, tokens; ``false`` does not.
        continuations: windows that the dense model writes itself for each fitted calibration window, and that are fitted too.
        damping: added to Gram diagonals, as a fraction of their mean.
        global_blocks: blocks whose feed-forward the alternation solves: ``all``, ``none``, ``first_half`` or indices.
        alpha: weight of the pre-activation terms.
        beta: weight of the output term.
        gamma: weight of the activation term.
        scale_free: measure each term by the mean square of its target. False is the paper's raw objective.
        block_size: columns per step of the SparseGPT sweep.
        num_calibration_samples: calibration windows, over all ranks.
        held_out: share of calibration windows that nothing is fitted to, on which choices are made.
        allocation_spread: by how much a block's sparsity, with ``error`` a projection's, may differ from the mean.
        solver_precision: ``auto`` or ``float32``: products that update the auxiliaries may be bfloat16, or not.
        alternation_tokens: ``auto``, or calibration tokens that carry the alternation's auxiliaries.
        memory: ``auto``, or bytes that pruning may hold on each device besides the model.
        skip: name patterns of projections left dense.
        finetune: train on after pruning, with the zeros held; otherwise the run stops.
        schedule: gradual pruning: optimizer step -> sparsity reached there, such as ``{0: 0.5, 50: 0.6, 100: 0.7}``. Every
            stage solves anew, and prunes what the stage before had pruned and more. Needs ``finetune``; replaces ``sparsity``.
        export_dir: folder for the Hugging Face model and ``pruning_report.json``, written when the run ends.
        journal_dir: folder for finished blocks: a run killed while pruning and started again goes on at the first unfinished
            one. With ``schedule``, a folder a stage.
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
        quality: Quality | None = None,
        method: Method | None = None,
        local_solver: LocalSolver | None = None,
        num_iterations: int | None = None,
        target: Target | None = None,
        allocation: Allocation | None = None,
        refine: Refine | None = None,
        reconstruct: Reconstruction | Literal[False] | None = None,
        continuations: int | None = None,
        damping: float | None = None,
        global_blocks: str | list[int] = "all",
        alpha: float = 1.0,
        beta: float = 10.0,
        gamma: float = 1.0,
        scale_free: bool = True,
        block_size: int = 128,
        num_calibration_samples: int = 128,
        held_out: float = 1 / 8,
        allocation_spread: float = 0.15,
        solver_precision: Precision = "auto",
        alternation_tokens: AutoOrNumber = "auto",
        memory: AutoOrNumber = "auto",
        skip: Sequence[str] = (),
        finetune: bool = False,
        schedule: dict[int, float] | None = None,
        export_dir: str | None = None,
        journal_dir: str | None = None,
        overwrite: bool = False,
        measure: bool = True,
        model_attribute: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.schedule = None if schedule is None else _check_schedule(schedule, sparsity, pattern, finetune)
        self.config = PruningConfig(
            sparsity=sparsity if self.schedule is None else list(self.schedule.values())[-1],
            pattern=pattern,
            quality=quality,
            # None is what quality says, or the default.
            method=method,  # type: ignore[arg-type]
            local_solver=local_solver,  # type: ignore[arg-type]
            num_iterations=num_iterations,  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
            allocation=allocation,  # type: ignore[arg-type]
            refine=refine,  # type: ignore[arg-type]
            reconstruct=reconstruct,  # type: ignore[arg-type]
            continuations=continuations,  # type: ignore[arg-type]
            damping=damping,  # type: ignore[arg-type]
            global_blocks=global_blocks,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            scale_free=scale_free,
            block_size=block_size,
            num_calibration_samples=num_calibration_samples,
            held_out=held_out,
            allocation_spread=allocation_spread,
            solver_precision=solver_precision,
            alternation_tokens=alternation_tokens,
            memory=memory,
            skip=tuple(skip) if not isinstance(skip, str) else skip,
            seed=seed,
        )
        self.finetune = finetune
        self.export_dir = export_dir
        self.journal_dir = journal_dir
        self.overwrite = overwrite
        self.measure = measure
        self.model_attribute = model_attribute
        self.report: PruningReport | None = None
        self._stopwatch = Stopwatch()

    @property
    def pruned(self) -> bool:
        """Whether this run, or the one it resumes, has pruned."""
        return self.report is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if trainer.max_steps == 0 or trainer.max_epochs == 0 or trainer.limit_train_batches == 0:
            raise UserError(
                "SparseLLMCallback prunes when training starts, but nothing would run: max_steps, max_epochs and "
                f"limit_train_batches must not be 0, got {trainer.max_steps}, {trainer.max_epochs} and "
                f"{trainer.limit_train_batches}. To prune only, leave them alone and set finetune to false."
            )
        if not self._trains_on(pl_module) and (trainer.min_steps or trainer.min_epochs):
            raise UserError(
                "With finetune=False the run stops after pruning, but min_steps / min_epochs ask for "
                f"{trainer.min_steps} / {trainer.min_epochs}. Leave them out, or set finetune to true."
            )
        if sum(isinstance(c, SparseFinetuning) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError(
                "SparseLLMCallback keeps the zeros itself, but the Trainer has another SparseFinetuning or SparseLLMCallback. "
                "Keep one; with SparseLLMCallback, set finetune to true."
            )
        if self.schedule is not None:
            self._check_run(trainer, self.schedule)
        if self.export_dir is not None and trainer.is_global_zero:
            check_export_dir(self.export_dir, self.overwrite)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        describe(self._model(pl_module), self.config)
        if self.schedule is not None and has_adapters(pl_module):
            raise UserError(
                "Gradual pruning solves for weights that LoRA adapters would shift. Leave out schedule or lora."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model, adapter = self._model(pl_module), adapter_for(trainer)
        if self.pruned:
            if trainer.is_global_zero:
                log.info("This run resumes one that has pruned; not pruning again.")
            self._hold(trainer, pl_module)
        elif _is_sparse_already(pl_module):
            self.report = report_of_sparse(describe(model, self.config), adapter, self.config)
            if self.report.sparsity["achieved"] < 0.01:
                raise UserError(
                    "weights must name a sparse model, but only "
                    f"{100 * self.report.sparsity['achieved']:.2f} % of the projections of "
                    f"{pl_module.weights} are zero. To prune it, give it as pretrained instead."
                )
            self.report.perplexity["pruned"] = self._perplexity(trainer, model, adapter)
            self._hold(trainer, pl_module)
        else:
            self._prune(trainer, pl_module)
        self.report.model = getattr(pl_module, "pretrained", None) or self.report.model  # type: ignore[union-attr]
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
        if left and not _is_sparse_already(pl_module):
            rank_zero_warn(
                f"The run ended at step {trainer.global_step}, before the schedule's stages at {', '.join(map(str, left))}. "
                "Train longer, or prune earlier."
            )
        model, adapter = self._model(pl_module), adapter_for(trainer)
        if self._trains_on(pl_module):
            assert self._masks is not None
            zeros = sum(self._masks.zeros.values())
            self.report.mask_check = {
                "checks": self.checks,
                "layers": len(self._masks.zeros),
                "zeros": zeros,
                "broken": 0,
            }
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
                with self._stopwatch.phase("export"):
                    folder = export_model(model, self.export_dir, tokenizer, self.overwrite, state)
                self.report.phases |= self._stopwatch.seconds
                self.report.save(folder)
            trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"report": None if self.report is None else self.report.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        report = state_dict["report"]
        self.report = None if report is None else PruningReport(**report)

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, or prune further; measured before and after."""
        model, adapter = self._model(pl_module), adapter_for(trainer)
        before = self._perplexity(trainer, model, adapter)
        batches, sharded, source = calibration_batches(trainer, self.config.num_calibration_samples, self.config.seed)
        stages = [] if self.report is None else self.report.stages
        config = self.config
        if self.schedule is not None:
            config = replace(config, sparsity=list(self.schedule.values())[len(stages)], keep_zeros=bool(stages))
        journal = None if self.journal_dir is None else Path(self.journal_dir) / f"stage-{len(stages)}"
        report = prune_model(
            model,
            batches,
            config,
            adapter=adapter,
            sharded=sharded,
            journal_dir=journal,
            progress=trainer.progress_bar_callback is not None,
            on_iteration=lambda block, iteration, error: self._log(trainer, block, iteration, error),
        )
        report.calibration["source"] = source
        after = self._perplexity(trainer, model, adapter)
        dense = self.report.perplexity["dense"] if self.report is not None else before
        report.perplexity = {"dense": dense, "pruned": after}
        if self.schedule is not None:
            stage = {
                "step": trainer.global_step,
                "sparsity": report.sparsity["achieved"],
                "before": before,
                "after": after,
            }
            report.stages = [*stages, stage]
        self.report = report
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(callback, WeightAveraging) and average is not None:
                average.module.load_state_dict(pl_module.state_dict())  # it had copied the dense model
        self._hold(trainer, pl_module)

    def _hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trains_on(pl_module):
            projections = describe(self._model(pl_module), self.config).projections()
            self.hold(trainer, pl_module, [p for p in projections if p.pruned])

    def _trains_on(self, pl_module: pl.LightningModule) -> bool:
        return self.finetune or _is_sparse_already(pl_module)

    @staticmethod
    def _check_run(trainer: pl.Trainer, schedule: dict[int, float]) -> None:
        last = list(schedule)[-1]
        if 0 < trainer.max_steps <= last:
            raise UserError(
                f"schedule has a stage at step {last}, but the run ends at max_steps {trainer.max_steps}. Train longer, or "
                "prune earlier."
            )
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "Gradual pruning cannot be combined with weight averaging: the average of weights before and after a stage is "
                "not sparse. Leave out schedule, or average in a second run (CausalLM(weights=...))."
            )

    def _model(self, pl_module: pl.LightningModule) -> PreTrainedModel:
        return find_model(pl_module, self.model_attribute)

    def _perplexity(self, trainer: pl.Trainer, model: PreTrainedModel, adapter: StrategyAdapter) -> float | None:
        """On the validation windows; None where there are none or the model has no language-model head."""
        if not self.measure or model.get_output_embeddings() is None:
            return None
        batches, sharded = validation_batches(trainer)
        if batches is None:
            return None
        with self._stopwatch.phase("evaluation"):
            return perplexity(model, batches, adapter, sharded=sharded)

    @staticmethod
    def _log(trainer: pl.Trainer, block: int, iteration: int, error: float) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"prune/block_{block:03d}_error": error}, step=iteration)


def _is_sparse_already(pl_module: pl.LightningModule) -> bool:
    return getattr(pl_module, "weights", None) is not None


def _check_schedule(
    schedule: dict[int, float], sparsity: float | None, pattern: str, finetune: bool
) -> dict[int, float]:
    """The stages in order.

    Raises:
        UserError: they do not begin at step 0, do not rise, or contradict other settings.
    """
    stages = {int(step): float(value) for step, value in sorted(schedule.items())}
    rising = all(low < high for low, high in pairwise(stages.values()))
    if not stages or next(iter(stages)) != 0 or not rising or not all(0 < value < 1 for value in stages.values()):
        raise UserError(
            f"schedule must begin at step 0 and rise within (0, 1), got {schedule}. Write {{0: 0.5, 50: 0.6, 100: 0.7}}."
        )
    if not finetune:
        raise UserError("schedule prunes in the course of training, but finetune is false. Set finetune to true.")
    if pattern != "unstructured" or sparsity not in (None, list(stages.values())[-1]):
        raise UserError(
            f"schedule gives the sparsity of every stage and needs pattern unstructured, got sparsity {sparsity} and pattern "
            f"{pattern}. Leave both out."
        )
    return stages
