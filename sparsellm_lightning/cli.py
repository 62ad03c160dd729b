"""The ``sparsellm`` command: Lightning's subcommands, and ``prune`` and ``evaluate``."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from sparsellm_lightning.architecture import describe, find_model
from sparsellm_lightning.callbacks import SparseLLMCallback
from sparsellm_lightning.data import TextDataModule
from sparsellm_lightning.distributed import adapter_for
from sparsellm_lightning.errors import NumericalError, UserError
from sparsellm_lightning.models import CausalLM
from sparsellm_lightning.reporting import format_table, layer_rows


class PruningTrainer(pl.Trainer):
    """A Trainer with the methods ``prune`` and ``evaluate``, which LightningCLI turns into subcommands."""

    def prune(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Measure the dense model, prune it, measure again, export, and print a table."""
        if _pruner(self).finetune:
            raise UserError("'prune' stops after pruning, but pruner.finetune is true. Use 'fit', or set it to false.")
        self.num_sanity_val_steps = 0  # the pruner measures the dense model on every window
        self.fit(model, datamodule=datamodule)
        show_report(self)

    def evaluate(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Measure a model's perplexity on the test windows, and the sparsity of its decoder blocks."""
        results = self.test(model, datamodule=datamodule, verbose=False)
        _, sparsity = layer_rows(describe(find_model(model)), adapter_for(self))
        if self.is_global_zero:
            name = str(getattr(model, "pretrained", type(model).__name__))
            rows = [
                ("model", "sparsity", "perplexity"),
                (name, f"{100 * sparsity:.2f} %", f"{results[0]['test_perplexity']:.2f}"),
            ]
            print(format_table(rows))


def _pruner(trainer: pl.Trainer) -> SparseLLMCallback:
    return next(c for c in trainer.callbacks if isinstance(c, SparseLLMCallback))  # type: ignore[attr-defined]


def show_report(trainer: pl.Trainer) -> None:
    """Print the report's tables, and where the model was written."""
    pruner = _pruner(trainer)
    if trainer.is_global_zero and pruner.report is not None:
        print(f"{pruner.report.table()}\n")
        if pruner.report.work:  # empty for a model that was sparse already
            print(f"{pruner.report.phase_table()}\n")
        if pruner.export_dir is not None:
            print(f"written to {pruner.export_dir}")


class SparseLLMCLI(LightningCLI):
    """``sparsellm``: the model is ``--model``, the text ``--data``, the pruning callback ``--pruner``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "prune": {"model", "datamodule"},
            "evaluate": {"model", "datamodule"},
            **{name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"},
        }

    def after_fit(self) -> None:
        """Show the report, as ``prune`` does."""
        show_report(self.trainer)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SparseLLMCallback, "pruner")  # type: ignore[arg-type]


class SaveConfigBesideLogs(SaveConfigCallback):
    """Saves the resolved configuration in the logger's folder, if there is a logger."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


def main(args: Any = None) -> None:
    """Entry point of ``sparsellm``. A user's mistake ends it with one message and status 1."""
    try:
        SparseLLMCLI(
            CausalLM,
            TextDataModule,
            trainer_class=PruningTrainer,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigBesideLogs,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except (UserError, NumericalError, MisconfigurationException) as error:
        print(f"sparsellm: error: {error}", file=sys.stderr)
        sys.exit(1)
