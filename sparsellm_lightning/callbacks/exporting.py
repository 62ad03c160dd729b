"""The export of a run: its folder is checked and claimed before, and written at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from sparsellm_lightning.architecture import DecoderLayout, device_of, unwrapped
from sparsellm_lightning.callbacks.checks import check_folders_apart
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import datamodule_of, run_tokenizer
from sparsellm_lightning.distributed import adapter_for, failing_with_first
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import (
    check_companions,
    check_export_dir,
    check_hub,
    check_rebuildable,
    check_shrinkable,
    export_model,
    export_or_rescue,
    fixed_shrinkage,
    note_untied,
    plain_class,
    recover_export,
    shrink,
    upload,
)
from sparsellm_lightning.reporting import PruningReport, report_of_smaller, save_companions
from sparsellm_lightning.runtime import claimed
from sparsellm_lightning.sparsity import check_mergeable, has_adapters

log = logging.getLogger(__name__)


class Exporter:
    """Writes the model and the report of one run. All ranks call its methods together; rank 0 writes.

    Args:
        folder: ``export_dir``.
        overwrite, pack, push_to_hub: as in :class:`~sparsellm_lightning.SparseLLMCallback`.
    """

    def __init__(self, folder: str, overwrite: bool, pack: bool, push_to_hub: str | None) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.pack = pack
        self.push_to_hub = push_to_hub
        self._claim = ExitStack()

    def claim(self, trainer: pl.Trainer, resume_dir: str | None) -> None:
        """Refuse other runs the folder until :meth:`release`.

        Raises:
            UserError: a folder that is not empty, or that another run has claimed; a journal or checkpoints inside it; a hub
                that cannot be written.
        """
        with failing_with_first(trainer):
            check_folders_apart(trainer, self.folder, resume_dir)
            if trainer.is_global_zero:
                if self.push_to_hub is not None:
                    check_hub(self.push_to_hub)
                check_export_dir(self.folder, self.overwrite)
                self._claim.enter_context(claimed(self.folder, "export_dir"))
                recover_export(Path(self.folder))

    def release(self) -> None:
        """Leave the folder to other runs."""
        self._claim.close()

    def check(self, pl_module: pl.LightningModule, layout: DecoderLayout, config: PruningConfig) -> None:
        """Refuse what could not be exported after the run.

        Raises:
            UserError: a model that cannot be made smaller, packed or, where it is sharded, built anew; adapters that cannot be
                merged; a tokenizer that cannot be loaded; or a tokenizer or configuration that transformers cannot save.
        """
        model, trainer = layout.model, pl_module.trainer
        plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
        if self.pack and plain_class(model) is not plain:
            raise UserError(
                f"pack writes files that load_model reads as a plain causal language model, but the model is a "
                f"{type(model).__name__}. Set pack to false."
            )
        split = adapter_for(trainer).weights_are_split
        if not split:
            note_untied(model)
        with failing_with_first(trainer):
            tokenizer = run_tokenizer(datamodule_of(trainer), pl_module)
            if trainer.is_global_zero:  # a copy that another rank has received counts as changed
                check_companions(model, tokenizer, Path(self.folder))
            if config.removed_shares:
                check_shrinkable(layout, fixed_shrinkage(layout, config))
            check_mergeable(model)
            wrapped = any(unwrapped(name) != name for name, _ in model.named_parameters())
            if wrapped or config.removes or has_adapters(model) or split:
                check_rebuildable(model)

    def write(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: PreTrainedModel,
        config: PruningConfig,
        report: PruningReport,
    ) -> None:
        """Write the folder, and upload it.

        Removed units, heads and blocks, which are zeros until then, are cut out first, and the report describes the smaller
        model. If they cannot be cut out, the model is written with the zeros, with a warning. All ranks wait for rank 0.
        """
        adapter, start = adapter_for(trainer), time.perf_counter()
        with adapter.ranks.failing_together("Export"):
            state = adapter.state_dict(model)
        layout = adapter.describe(model, config) if config.removes else None
        with failing_with_first(trainer):
            if trainer.is_global_zero:
                with nullcontext() if adapter.weights_are_split else _on_the_host(model):
                    if layout is not None:
                        model, state, report = _cut(layout, config, state, report)
                    self._write(trainer, pl_module, model, state, report, start)

    def _write(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        model: PreTrainedModel,
        state: dict[str, Tensor] | None,
        report: PruningReport,
        start: float,
    ) -> None:
        """Write the folder from whole weights, or those of the model on its own. ``start``: of the phase."""

        def content() -> dict[str, Any]:
            report.phases["export"] = time.perf_counter() - start
            return report.to_dict()

        export = partial(
            export_model,
            model,
            tokenizer=run_tokenizer(datamodule_of(trainer), pl_module),
            state_dict=state,
            report=content,
            more=partial(save_companions, report, packed=self.pack),
            pack=self.pack,
        )
        export_or_rescue(export, Path(self.folder), self.overwrite)
        if self.push_to_hub is not None:
            log.info("Uploaded to %s", upload(Path(self.folder), self.push_to_hub))


def _cut(
    layout: DecoderLayout, config: PruningConfig, state: dict[str, Tensor] | None, report: PruningReport
) -> tuple[PreTrainedModel, dict[str, Tensor] | None, PruningReport]:
    """The smaller model, its weights if the model does not hold them, and the report of it."""
    try:
        smaller = shrink(layout, config, state)
    except Exception as error:  # better the model with zeros than none
        log.warning("The model is written with zeros in place of the parts to remove. %s", error)
        return layout.model, state, report
    return smaller.model, None, report_of_smaller(report, layout, smaller)


@contextmanager
def _on_the_host(model: PreTrainedModel) -> Iterator[None]:
    """Smaller models and files of fused experts are copies, for which the device may have no room."""
    device = device_of(model)
    model.cpu()
    try:
        yield
    finally:
        model.to(device)  # type: ignore[arg-type]
