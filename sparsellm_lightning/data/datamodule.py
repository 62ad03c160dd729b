"""The datamodule: windows of tokens from a text, for calibration, fine-tuning and perplexity."""

from __future__ import annotations

import random
from inspect import signature
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from sparsellm_lightning.architecture import find_model
from sparsellm_lightning.data.loaders import ResumableLoader, WindowDataset, Windows
from sparsellm_lightning.data.sources import Split, TextSource, c4_documents, c4_train_tokens, check_files
from sparsellm_lightning.data.synthetic import generate_windows
from sparsellm_lightning.distributed import adapter_for
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import CausalLM, load_tokenizer, tokenizer_of

C4_TEST_WINDOWS = 256
C4_TRAIN_WINDOWS = 10_000


class TextDataModule(LightningDataModule):
    """Windows of tokens from a text, for calibration, fine-tuning and perplexity.

    ``wikitext2``, ``ptb`` and ``c4`` follow ``datautils.py`` of the SparseGPT authors
    (https://github.com/IST-DASLab/sparsegpt/blob/master/datautils.py), so that perplexities compare with published ones: the
    same splits, joined in the same way; calibration windows drawn by Python's ``random`` at offsets ``randint(0, n - T - 1)``
    (for ``c4``, from a random document longer than the window each time); evaluation on all consecutive windows of the test
    text (for ``c4``, the first 256 windows of the first 1100 validation documents). Two differences: labels are the whole
    window, and a fast tokenizer is used if the model has one.

    Other sources join their texts with a blank line. ``python-docs`` is the reference text inside Python itself
    (``pydoc_data.topics``), which needs no network but differs between Python versions: by sorted topic, every fifth
    topic (1st, 6th, ...) is evaluation text and the rest is train text.

    With ``self`` there is no train text: the dense model in the trainer's module writes the windows
    (:func:`~sparsellm_lightning.generate_windows`), which needs neither network nor tokenizer. ``max_train_windows`` says how
    many windows to write for training; without it there are none. Windows are generated once a run, and a checkpoint holds
    them, so that a resumed run uses the same ones.

    A text is tokenised as a whole (for calibration on ``c4``, each drawn document), with the tokenizer's defaults, on first
    use. Every item of every loader is ``{"input_ids": (T,), "labels": (T,)}``, int64 and equal; batches are ``(B, T)``. On
    several ranks every rank gets equally many evaluation windows. Missing ones are repeated windows: with labels of -100, which
    do not count, if the module has :class:`~sparsellm_lightning.CausalLM`'s evaluation steps, otherwise with their labels.

    Args:
        source: ``wikitext2``, ``ptb``, ``c4``, ``python-docs``, ``files``, ``self``, or the hub id of another dataset.
        sequence_length: tokens per window, T.
        batch_size: windows per batch, in generation too.
        train_files: for source ``files``: ``.txt`` (UTF-8, one text, as it is), ``.jsonl``, ``.json`` or ``.parquet``.
        test_files: likewise, for evaluation, also with source ``self``.
        text_field: column with the text, in ``.jsonl``, ``.json``, ``.parquet`` and other hub datasets.
        dataset_config: configuration name of another hub dataset.
        train_split: split of another hub dataset used for calibration and training.
        test_split: split of another hub dataset used for evaluation.
        max_train_windows: upper limit of the windows for training. None: no limit; for ``c4`` 10,000; for ``self`` no
            windows, so that training is refused.
        max_eval_windows: upper limit of the windows for evaluation, from the start of the text. None: no limit.
        num_workers: worker processes per loader.
        seed: of the order of training windows, and of calibration windows if the caller passes no seed. The pruner passes
            ``pruner.seed``.
        tokenizer: a tokenizer, or the model it belongs to, as ``load_tokenizer`` takes it. None: the ``tokenizer`` of the
            trainer's module.
        model_attribute: attribute of the trainer's module that holds the model of source ``self``, if it holds several.

    Attributes:
        settings: the arguments that differ from their defaults, without a tokenizer that is an object.

    Raises:
        UserError: a value out of its range, a missing file, or settings that do not belong to the source.
    """

    def __init__(
        self,
        source: str = "python-docs",
        sequence_length: int = 512,
        batch_size: int = 8,
        train_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        text_field: str = "text",
        dataset_config: str | None = None,
        train_split: str = "train",
        test_split: str = "test",
        max_train_windows: int | None = None,
        max_eval_windows: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        model_attribute: str | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        _at_least(2, sequence_length=sequence_length)  # a token that predicts, and one that is predicted
        _at_least(1, batch_size=batch_size)
        _at_least(1, max_train_windows=max_train_windows, max_eval_windows=max_eval_windows)
        _at_least(0, num_workers=num_workers)
        usual = {name: parameter.default for name, parameter in signature(TextDataModule).parameters.items()}
        if not isinstance(tokenizer, str):
            usual.pop("tokenizer")  # an object, which no configuration file can name
        self.settings = {name: _plain(given[name]) for name in usual if given[name] != usual[name]}
        self.source = source
        self.texts = TextSource(
            source,
            {"train": check_files("train_files", train_files), "test": check_files("test_files", test_files)},
            text_field,
            dataset_config,
            {"train": train_split, "test": test_split},
        )
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.max_train_windows = max_train_windows
        self.max_eval_windows = max_eval_windows
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = tokenizer
        self.model_attribute = model_attribute
        self._tokens: dict[Split, Tensor] = {}
        self._tokens_of: PreTrainedTokenizerBase | None = None
        self._generated: dict[tuple[int, int], Tensor] = {}  # by seed and length
        self._resumed = False  # whether these come from a checkpoint
        self._trains = True

    @property
    def calibration_text(self) -> str:
        """The train text by name."""
        return self._name("train")

    @property
    def evaluation_text(self) -> str:
        """The evaluation text by name."""
        return self._name("test")

    def _name(self, split: Split) -> str:
        if (self.source, split) == ("self", "train"):
            return "self"
        files = [path.name for path in self.texts.files[split]]
        return ", ".join(files) if files else f"{self.source}, {self.texts.splits[split]} split"

    def prepare_data(self) -> None:
        """Download hub datasets once, in one process per node. An evaluation run does not download c4's train text.

        Raises:
            UserError: the dataset, its configuration or its split is not available.
        """
        evaluating = (TrainerFn.VALIDATING, TrainerFn.TESTING)
        self.texts.download(evaluation_only=self.trainer is not None and self.trainer.state.fn in evaluating)

    def setup(self, stage: str) -> None:
        """Forget the windows that the model of an earlier run generated."""
        self._generated.clear()
        self._resumed, self._trains = False, True

    def teardown(self, stage: str) -> None:
        """Let :meth:`train_dataloader` give the training windows again after the run."""
        self._trains = True

    def on_exception(self, exception: BaseException) -> None:
        """Do what :meth:`teardown` does, which Lightning does not call after an exception."""
        self._trains = True

    def state_dict(self) -> dict[str, Any]:
        """The generated windows. A resumed run has only the pruned model, and needs the dense model's windows."""
        return {"generated": dict(self._generated)} if self._generated else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generated = dict(state_dict["generated"])
        self._resumed = True

    def calibration_dataloader(self, num_samples: int = 128, seed: int | None = None) -> Windows:
        """Windows at uniformly random offsets of the train text, in the order drawn. With ``self``, generated windows.

        The first n windows of a longer draw with the same seed are the same windows.

        Args:
            num_samples: number of windows.
            seed: of the draw. None: the datamodule's.

        Raises:
            UserError: ``num_samples`` below 1, no train text, a train text not longer than a window, or source ``self``
                outside a Trainer or with a model that cannot generate.
        """
        _at_least(1, num_samples=num_samples)
        seed = self.seed if seed is None else seed
        if self.source == "self":
            return self._loader(self._generated_windows(num_samples, seed))
        rng = random.Random(seed)
        if self.source == "c4":
            texts = c4_documents(self.texts.table("train"), self.sequence_length, self._tokenise, rng)
        else:
            tokens = self._text_tokens("train")
            if len(tokens) <= self.sequence_length:
                raise UserError(
                    f"calibration needs a train text longer than sequence_length, got {len(tokens)} tokens and "
                    f"sequence_length {self.sequence_length}. Give more text or a smaller sequence_length."
                )
            if num_samples * self.sequence_length > len(tokens):
                rank_zero_warn(
                    f"{num_samples} calibration windows of {self.sequence_length} tokens are drawn from a text of "
                    f"{len(tokens)}: they overlap, with held-out windows too. Give more text, or fewer or shorter windows."
                )
            texts = repeat(tokens)
        windows = []
        for text in islice(texts, num_samples):
            # The authors' rule: the last possible offset, n - T, is never drawn.
            offset = rng.randint(0, len(text) - self.sequence_length - 1)
            windows.append(text[offset : offset + self.sequence_length])
        return self._loader(torch.stack(windows))

    def train_dataloader(self) -> Windows:
        """Consecutive windows of the train text, in a random order that differs between epochs. The last, incomplete window is
        dropped.

        The order depends on the seed and the epoch only. The loader stores its position in checkpoints, so a resumed run sees
        the windows that it would have seen. Ranks take turns.

        For ``c4`` the text is the beginning of the first shard's documents, long enough for ``max_train_windows`` (or 10,000)
        windows. For ``self`` the windows are generated; without ``max_train_windows`` the first batch raises.

        Raises:
            UserError: no train text, or one shorter than a window; fine-tuning with ``self`` and no ``max_train_windows``.
        """
        collate = None
        if not self._trains or (self.source == "self" and self.max_train_windows is None):
            # Lightning needs a loader even in a run that only prunes, but takes no batch from it. The loader is long, so that
            # limit_train_batches as a fraction leaves at least one batch, and val_check_interval does not exceed its length.
            windows, collate = torch.empty(10_000_000, 0), self._refuse_batch
        elif self.source == "self":
            assert self.max_train_windows is not None
            windows = self._generated_windows(self.max_train_windows, self.seed)
        else:
            windows = self._consecutive_windows("train", self.max_train_windows)
        world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        dataset = WindowDataset(windows)
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, world, rank, shuffle=True, seed=self.seed)
        loader = ResumableLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=0 if collate else self.num_workers,
            generator=torch.Generator(),
            collate_fn=collate,
            limit=1.0 if self.trainer is None else self.trainer.limit_train_batches,
        )
        if self.trainer is not None and self.trainer.training:  # it may ask for a loader anew each epoch
            # Not current_epoch, which is one behind in a run that resumes from the end of an epoch.
            epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
            loader.load_state_dict({"epoch": epoch, "batches": 0})
        return loader

    def _refuse_batch(self, batch: Any) -> Any:
        self.check_training()
        raise UserError(
            "This run only prunes, and has no training windows, but something asks for a batch of them, such as a tuner of "
            "Lightning. Leave that out, or set finetune to true."
        )

    def without_training(self) -> None:
        """This run takes no training batch, so that its training windows are not made. Pruning calls this."""
        self._trains = False

    def check_training(self) -> None:
        """Refuse training on a source without training windows. Pruning calls this before its own work if training follows.

        Raises:
            UserError: source ``self`` without ``max_train_windows``.
        """
        if self.source == "self" and self.max_train_windows is None:
            raise UserError(
                "source self needs max_train_windows to train, got none. Set max_train_windows to the number of windows to "
                "generate, or give train text with another source."
            )

    def val_dataloader(self) -> Windows | list[Windows]:
        """The windows of :meth:`test_dataloader`. With ``files`` or ``self`` and without ``test_files`` there are none."""
        if self.source in ("files", "self") and not self.texts.files["test"]:
            return []
        return self.test_dataloader()

    def test_dataloader(self) -> Windows:
        """Consecutive windows from the start of the evaluation text, in order. The last, incomplete window is dropped.

        Raises:
            UserError: no evaluation text, or one shorter than a window.
        """
        ranks = 1
        if self.trainer is not None:
            # CausalLM's evaluation steps count labelled tokens only, so windows without labels can fill up a rank's share. In
            # other modules the mean loss of a batch without labels would be NaN.
            steps, module = ("validation_step", "test_step"), type(self.trainer.lightning_module)
            counts = all(getattr(module, step, None) is getattr(CausalLM, step) for step in steps)
            ranks = self.trainer.world_size if counts else 1
        return self._loader(self._consecutive_windows("test", self.max_eval_windows), ranks)

    def _get_tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.tokenizer is not None:
            return self.tokenizer
        module = None if self.trainer is None else self.trainer.lightning_module
        tokenizer: PreTrainedTokenizerBase | None = tokenizer_of(module)
        if tokenizer is None:
            raise UserError(
                "TextDataModule needs a tokenizer, got none from its constructor and none from the trainer's module. "
                "Pass tokenizer=, a tokenizer or the name of its model."
            )
        return tokenizer

    def _tokenise(self, text: str) -> Tensor:
        # verbose=False suppresses the warning that the text is longer than the model's context.
        encoded = self._get_tokenizer()(text, return_attention_mask=False, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.long)

    def _text_tokens(self, split: Split) -> Tensor:
        """All tokens of a split, shape (n,), tokenised once per tokenizer."""
        tokenizer = self._get_tokenizer()
        if tokenizer is not self._tokens_of:
            self._tokens.clear()
            self._tokens_of = tokenizer
        if split not in self._tokens:
            if (self.source, split) == ("c4", "train"):
                needed = (self.max_train_windows or C4_TRAIN_WINDOWS) * self.sequence_length
                self._tokens[split] = c4_train_tokens(self.texts.table("train"), needed, self._tokenise)
            else:
                self._tokens[split] = self._tokenise(self.texts.text(split))
        return self._tokens[split]

    def _consecutive_windows(self, split: Split, limit: int | None) -> Tensor:
        """Shape (N, T), N at most ``limit``."""
        tokens = self._text_tokens(split)
        count = len(tokens) // self.sequence_length
        if count == 0:
            raise UserError(
                f"the {split} text must fill at least one window, got {len(tokens)} tokens and sequence_length "
                f"{self.sequence_length}. Give more text or a smaller sequence_length."
            )
        if (self.source, split) == ("c4", "test"):
            count = min(count, C4_TEST_WINDOWS)
        count = count if limit is None else min(count, limit)
        return tokens[: count * self.sequence_length].view(count, self.sequence_length)

    def _generated_windows(self, count: int, seed: int) -> Tensor:
        """Shape (count, T), from the trainer's model. All ranks call this together."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if self.trainer is None or module is None:
            raise UserError(
                "source self generates windows with the model of a Trainer's module, got no such module. Pass the datamodule "
                "to trainer.fit, or call generate_windows with the model."
            )
        key = seed, self.sequence_length
        if len(self._generated.get(key, ())) < count:
            if self._resumed:
                raise UserError(
                    f"source self wrote its windows with the dense model, and the checkpoint does not hold the {count} of "
                    f"{self.sequence_length} tokens that this run asks for. Restore data.seed, data.sequence_length and "
                    "data.max_train_windows, or start a new run."
                )
            rank_zero_info(f"Generating {count} windows of {self.sequence_length} tokens with the model itself.")
            self._generated[key] = generate_windows(
                find_model(module, self.model_attribute),
                count,
                self.sequence_length,
                seed=seed,
                batch_size=self.batch_size,
                adapter=adapter_for(self.trainer),
            )
        return self._generated[key][:count]

    def _loader(self, windows: Tensor, ranks: int = 1) -> Windows:
        # A generator of its own, because making an iterator draws from the generator, and dropout draws from the global one.
        return DataLoader(
            WindowDataset(windows, ranks), self.batch_size, num_workers=self.num_workers, generator=torch.Generator()
        )


def _plain(value: Any) -> Any:
    """A path, or each of several, as a string, and NumPy's numbers, which JSON does not know, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, got {value}. Write {minimum} or more.")
