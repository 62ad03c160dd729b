"""The ``sparsellm`` command: prune, evaluate, verify, inspect, benchmark, sweep and Lightning's subcommands."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import auto_cli, set_parsing_settings
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sparsellm_lightning.architecture import find_model
from sparsellm_lightning.callbacks import SparseFinetuning, SparseLLMCallback
from sparsellm_lightning.commands import benchmark, inspect, verify
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import TextDataModule, run_tokenizer
from sparsellm_lightning.distributed import PeerError, StrategyAdapter, adapter_for
from sparsellm_lightning.errors import NumericalError, UserError
from sparsellm_lightning.mistakes import brief
from sparsellm_lightning.models import (
    REPORT_NAME,
    CausalLM,
    check_checkpoint,
    is_sparse_already,
    load_model,
    load_tokenizer,
    pretrained_of,
    weights_of,
)
from sparsellm_lightning.quiet import quieten
from sparsellm_lightning.reporting import format_table, layer_rows
from sparsellm_lightning.shorthand import expanded
from sparsellm_lightning.sweep import sweep


class PruningTrainer(pl.Trainer):
    """A Trainer with the methods ``prune`` and ``evaluate``, which LightningCLI turns into subcommands.

    Args:
        max_epochs: largest number of epochs. None: 1 if no other limit or minimum is set (Lightning's Trainer takes 1000).
        max_steps: largest number of optimizer steps. -1: no limit.
        max_time: longest time, as days:hours:minutes:seconds, such as ``00:12:00:00``.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time: str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        least = kwargs.get("min_epochs") or kwargs.get("min_steps")
        if max_epochs is None and max_steps == -1 and max_time is None and not least:
            max_epochs = 1
        super().__init__(max_epochs=max_epochs, max_steps=max_steps, max_time=max_time, **kwargs)

    def prune(self, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        """Measure the dense model, prune it, measure again, export, and print a table."""
        pruner = _pruner(self)
        if pruner.finetune:
            raise UserError("'prune' stops after pruning, but pruner.finetune is true. Use 'fit', or set it to false.")
        if is_sparse_already(model):
            raise UserError(
                "'prune' prunes model.pretrained, but model.weights names a model that is sparse already, whose zeros stay as "
                "they are. Train it with 'fit', or prune it further as model.pretrained."
            )
        if not _requeued():
            _refuse_left_checkpoint(self, "go on from it")
        if pruner.export_dir is None:
            name = pretrained_of(model) or type(model).__name__
            pruner.export_dir = str(default_export_dir(name, pruner.config, pruner.overwrite))
        if getattr(datamodule, "source", "") == "python-docs" and self.is_global_zero:
            print(
                "Calibration and perplexity: python-docs, the text inside Python. A model fits the text it is pruned on: give "
                "yours, with --data.source files --data.train_files FILE --data.test_files FILE."
            )
        self.num_sanity_val_steps = 0  # the pruner measures the dense model on every window
        self.fit(model, datamodule=datamodule)
        show_report(self)

    def evaluate(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        tasks: list[str] | None = None,
        tasks_folder: str | None = None,
        tasks_limit: int | None = None,
        against: str | None = None,
    ) -> None:
        """Measure a model's perplexity on the test windows, the sparsity of its decoder blocks, and accuracy on tasks.

        Args:
            model, datamodule: the model to measure, and its text.
            tasks: task names of lm_eval, such as [arc_easy, hellaswag]. Results go into an export's ``tasks.json``.
            tasks_folder: folder with YAML files of further tasks.
            tasks_limit: examples of each task. None: all.
            against: another model, such as the dense one. The table also gives the accuracy as a share of that model's.
        """
        name = weights_of(model) or pretrained_of(model) or type(model).__name__
        if against == name:
            raise UserError(
                f"against must be another model than the one that is measured, got {against}. Leave it out."
            )
        _refuse_left_checkpoint(self, f"evaluate it in place of {name}")
        harness = _harness(self) if tasks else None
        if harness is not None:
            known = harness.find_tasks(tasks, tasks_folder)
            tokenizers = {name: run_tokenizer(datamodule, model)}
            if against is not None:
                tokenizers[against] = load_tokenizer(against)
        elif (against, tasks_folder, tasks_limit) != (None, None, None):
            raise UserError("against, tasks_folder and tasks_limit belong to tasks, but there are none. Set tasks.")
        results = self.test(model, datamodule=datamodule, verbose=False)
        adapter, inside = adapter_for(self), find_model(model)
        if not adapter.weights_are_split:  # Lightning has moved every process's model to the CPU, where NCCL cannot sum
            adapter = StrategyAdapter()
        try:
            _, zeros = layer_rows(adapter.describe(inside), adapter)
            sparsity = f"{100 * zeros:.2f} %"
        except UserError as error:  # perplexity needs no decoder blocks that can be pruned
            sparsity = "unknown"
            warnings.warn(f"The sparsity is not known: {error}", stacklevel=2)
        if self.is_global_zero:
            perplexity = f"{results[0]['test_perplexity']:.2f}" if results else "-"  # limit_test_batches may be 0
            print(format_table([("model", "sparsity", "perplexity"), (name, sparsity, perplexity)]))
        if harness is not None:
            folder, found = Path(name).expanduser(), {}
            # One on the device at a time; shown and kept as soon as it is known.
            for each, tokenizer in tokenizers.items():
                measured: torch.nn.Module = inside if each == name else load_model(each, inside.dtype).eval()
                found[each] = harness.evaluate_tasks(
                    measured.to(self.strategy.root_device), tokenizer, tasks, known, tasks_limit
                )
                measured.cpu()
                print(f"\n{format_table(harness.task_rows(found))}")
                if (folder / REPORT_NAME).is_file():
                    print(f"written to {harness.save_tasks(folder, found, tasks_limit)}")


def _refuse_left_checkpoint(trainer: pl.Trainer, then: str) -> None:
    """Refuse a run in which Lightning would load, unasked, a checkpoint that an earlier, requeued SLURM job left."""
    left = trainer._checkpoint_connector._hpc_resume_path
    if left is not None and SLURMEnvironment.detect():
        raise UserError(
            f"default_root_dir holds {left}, which a requeued job left. Under SLURM Lightning would {then}. Move that file, or "
            "set trainer.default_root_dir to another folder."
        )


def _requeued() -> bool:
    """Whether SLURM has started this job before, so that it goes on."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _harness(trainer: pl.Trainer) -> Any:
    """The module :mod:`sparsellm_lightning.models.tasks`, refused before any work if it cannot be used."""
    if trainer.world_size > 1:
        raise UserError(f"tasks are evaluated in one process, got {trainer.world_size}. Set trainer.devices to 1.")
    try:
        return importlib.import_module("sparsellm_lightning.models.tasks")
    except ImportError as error:
        raise UserError(
            f"tasks need lm_eval with accelerate and peft, but {error.name} is not installed. Install them: pip install "
            "'sparsellm-lightning[eval]'."
        ) from error


def default_export_dir(model: str, config: PruningConfig, overwrite: bool = False) -> Path:
    """``outputs/MODEL-SPARSITY``, with a number behind it if that is taken and must not be replaced."""
    name = Path(model.removeprefix("package:")).name.removesuffix(".gguf")
    what = config.pattern_name if isinstance(config.pattern, dict) or ":" in config.pattern else ""
    if not what:
        kind = "" if config.pattern == "unstructured" else f"{config.pattern}-"
        what = f"{kind}{100 * config.requested_sparsity:g}"
    folder = Path("outputs") / re.sub(r"[^\w.]+", "-", f"{name}-{what}").strip("-")
    taken, number = folder, 2
    while not overwrite and taken.is_dir() and any(taken.iterdir()):
        taken, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return taken


def _pruner(trainer: pl.Trainer) -> SparseLLMCallback:
    return next(c for c in trainer.callbacks if isinstance(c, SparseLLMCallback))  # type: ignore[attr-defined]


def show_report(trainer: pl.Trainer) -> None:
    """Print the report's tables, and where the model was written."""
    pruner = _pruner(trainer)
    if trainer.is_global_zero and pruner.report is not None:
        print(f"{pruner.report.table()}\n")
        if pruner.report.work:  # empty for a model that was sparse already
            print(f"{pruner.report.phase_table()}\n")
        saving = trainer.checkpoint_callback
        checkpoint = getattr(saving, "last_model_path", "") or getattr(saving, "best_model_path", "")
        if pruner.export_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"written to {pruner.export_dir}")
        elif trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("The model was not written anywhere, because trainer.fast_dev_run is set.")
        elif checkpoint:
            print(f"A checkpoint is {checkpoint}. A folder for transformers is written with pruner.export_dir.")
        else:
            print("The model was not written anywhere, because pruner.export_dir is not set.")


def _by_name(ckpt_path: Any) -> bool:
    """Whether Lightning finds a checkpoint by a name, or there is none to find."""
    text = str(ckpt_path).lower()
    named = ckpt_path in (None, "last", "best", "hpc") or text == "registry" or text.startswith("registry:")
    return named or "://" in text


class Parser(LightningArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        print(f"sparsellm: error: {brief(message, parser._option_string_actions)}", file=sys.stderr)
        self.exit(2)


class SparseLLMCLI(LightningCLI):
    """``sparsellm``: the model is ``--model``, the text ``--data``, the pruning callback ``--pruner``.

    Args:
        command: the only one whose options are made, which takes a third of the time. None: those of all commands.
    """

    def __init__(self, *args: Any, command: str | None = None, **kwargs: Any) -> None:
        every = self.subcommands()
        if command in every:
            self.subcommands = lambda: {command: every[command]}  # type: ignore[method-assign]
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "prune": {"model", "datamodule"},
            "evaluate": {"model", "datamodule"},
            **{name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"},
        }

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:  # such as an unknown strategy
            raise UserError(f"The Trainer must accept its settings, but it does not: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Refuse what is no checkpoint before any work, and what would execute code.

        Lightning reads the whole file here, for hyperparameters, which CausalLM does not save.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        if not _by_name(path) and Path(path).expanduser().exists():
            check_checkpoint(path)

    def before_fit(self) -> None:
        """Refuse a checkpoint that is not there or not of this run, and a run that would keep no result."""
        self._check_ckpt_path("go on from it")
        pruner, checkpoints = _pruner(self.trainer), self.trainer.checkpoint_callbacks
        trains = pruner.finetune or is_sparse_already(self.model)
        kept = checkpoints if trains else [c for c in checkpoints if getattr(c, "save_last", None)]
        if pruner.export_dir is None and not kept:
            raise UserError(
                "'fit' must keep its model, but writes neither an export nor a checkpoint of it. Set pruner.export_dir, or "
                "use 'prune' if nothing is to be trained."
            )

    def before_test(self) -> None:
        """Refuse a checkpoint that is not there or not of this run. Adapters in it are masked as in training."""
        self._check_ckpt_path("evaluate it")
        self.trainer.callbacks.append(SparseFinetuning())  # type: ignore[attr-defined]

    def _check_ckpt_path(self, then: str) -> None:
        """Refuse a checkpoint that is not there, and one that Lightning would take unasked in a job that is not requeued."""
        path = self.config[self.subcommand].get("ckpt_path")
        if path is None and not _requeued():
            _refuse_left_checkpoint(self.trainer, then)
        if not _by_name(path) and not Path(path).expanduser().exists():
            raise UserError(
                f"ckpt_path must be a checkpoint, but there is no {path}. Correct the path, or leave it out."
            )

    before_validate = before_test

    def after_fit(self) -> None:
        """Show the report, as ``prune`` does."""
        show_report(self.trainer)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._subcommand = subcommand
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The pruner first, because that is what ``--help`` is asked for; Lightning's Trainer last."""
        if self._subcommand in ("prune", "fit"):
            parser.add_lightning_class_args(SparseLLMCallback, "pruner")  # type: ignore[arg-type]
        else:  # a configuration file of `prune` is accepted, options are not, see main
            parser.add_argument("--pruner", type=dict | None, help=argparse.SUPPRESS)
        parser.add_lightning_class_args(self._datamodule_class, "data")
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({"trainer.enable_model_summary": False})
        if self._subcommand in ("prune", "evaluate"):  # their results are not curves
            parser.set_defaults({"trainer.logger": False})


class SaveConfigBesideLogs(SaveConfigCallback):
    """Saves the resolved configuration in the folder that the first logger has made for the run, if it has made one."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Other loggers write to the working directory, or nowhere.
        if trainer.loggers and trainer.loggers[0].log_dir is not None:
            super().setup(trainer, pl_module, stage)


def main(args: Any = None) -> None:
    """Entry point of ``sparsellm``.

    A mistake in the options ends it with one message and status 2, another mistake of the user with one message and status 1,
    Ctrl-C with status 130 and SIGTERM with status 143.
    """
    arguments = expanded(sys.argv[1:] if args is None else args)
    if args is None:
        sys.argv[1:] = arguments  # LightningCLI warns of arguments that are given in another way
    quieten()
    set_parsing_settings(add_print_completion_argument=True)  # if shtab is installed
    try:
        given = next((a.partition("=")[0] for a in arguments if a.startswith("--pruner")), None)
        if given is not None and arguments[0] in ("evaluate", "validate", "test"):
            _end(f"error: {arguments[0]} prunes nothing, so there is no option {given}.", 2)
        command: Any = {"verify": verify, "inspect": inspect, "benchmark": benchmark, "sweep": sweep}.get(
            arguments[0] if arguments else ""
        )
        if command is not None:
            auto_cli(command, args=arguments[1:], prog=f"sparsellm {arguments[0]}", parser_class=Parser)
            return
        SparseLLMCLI(
            CausalLM,
            TextDataModule,
            trainer_class=PruningTrainer,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigBesideLogs,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=Parser,
            args=None if args is None else arguments,
            command=arguments[0] if arguments else None,
        )
    except (UserError, NumericalError, PeerError, MisconfigurationException) as error:
        _end(f"error: {error}", 1)
    except ValueError as error:
        if not isinstance(error.__cause__, UserError):  # jsonargparse wraps what an optional class refuses
            raise
        _end(f"error: {error.__cause__}", 1)
    except SIGTERMException:
        _end("ended by SIGTERM", 128 + signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits with status 1 after Ctrl-C.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        _end("ended by Ctrl-C", 128 + signal.SIGINT)


def _end(message: str, status: int) -> NoReturn:
    print(f"sparsellm: {message}", file=sys.stderr)
    sys.exit(status)
