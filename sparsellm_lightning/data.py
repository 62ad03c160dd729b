"""Windows of tokens for calibration, retraining and perplexity, and their loaders."""

from __future__ import annotations

import random
from itertools import islice, repeat
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from sparsellm_lightning.architectures import find_model
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.generation import generate_windows
from sparsellm_lightning.loading import load_tokenizer
from sparsellm_lightning.strategies import adapter_for
from sparsellm_lightning.texts import Split, TextSource, c4_documents, c4_train_tokens, check_files

Windows = DataLoader[dict[str, Tensor]]

C4_TEST_WINDOWS = 256
C4_TRAIN_WINDOWS = 10_000


class TextDataModule(LightningDataModule):
    """Windows of tokens from a text, for calibration, retraining and perplexity.

    ``wikitext2``, ``ptb`` and ``c4`` follow ``datautils.py`` of the SparseGPT authors
    (https://github.com/IST-DASLab/sparsegpt/blob/master/datautils.py), so that perplexities compare with published
    ones: which splits, how texts are joined, how calibration windows are drawn (Python's ``random``, offsets
    ``randint(0, n - T - 1)``; for ``c4`` a random document longer than the window each time), and evaluation on all
    consecutive windows of the test text (for ``c4`` the first 256 windows of the first 1100 validation documents). Two
    differences: labels are the whole window, and a fast tokenizer is used if the model has one.

    Other sources join their texts with a blank line. ``python-docs`` is the reference text inside Python itself
    (``pydoc_data.topics``), which needs no network but differs between Python versions: by sorted topic, every fifth
    topic (1st, 6th, ...) is evaluation text and the rest is train text.

    With ``self`` there is no train text: the model in the trainer's module writes its own windows, as it is before it is
    pruned (:func:`~sparsellm_lightning.generation.generate_windows`), which needs neither network nor tokenizer. To train on
    such windows too, say how many with ``max_train_windows``: they take time, which a run that only prunes is spared. All are
    generated once a run, and a checkpoint holds them, so that a resumed run goes on with the same ones.

    A text is tokenised as a whole, with the tokenizer's defaults, on first use. Every item of every loader is
    ``{"input_ids": (T,), "labels": (T,)}``, int64 and equal; batches are ``(B, T)``.

    Args:
        source: ``wikitext2``, ``ptb``, ``c4``, ``python-docs``, ``files``, ``self``, or the hub id of another dataset.
        sequence_length: tokens per window, T.
        batch_size: windows per batch; also of generation, where larger batches are faster.
        train_files: for source ``files``: ``.txt`` (one text, exactly as it is), ``.jsonl``, ``.json`` or ``.parquet``.
        test_files: likewise, for evaluation; for source ``self`` too.
        text_field: column with the text, in ``.jsonl``, ``.json``, ``.parquet`` and other hub datasets.
        dataset_config: configuration name of another hub dataset.
        train_split: split of another hub dataset used for calibration and training.
        test_split: split of another hub dataset used for evaluation.
        max_train_windows: at most this many windows for training. Without it all, but 10,000 for ``c4`` and none for
            ``self``.
        max_eval_windows: at most this many windows for evaluation, from the start of the text.
        num_workers: worker processes per loader.
        seed: seeds the calibration windows and the order of training windows.
        tokenizer: a tokenizer, or what its model is loaded from. Without it, the ``tokenizer`` of the trainer's module.

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
    ) -> None:
        super().__init__()
        _at_least(1, sequence_length=sequence_length, batch_size=batch_size)
        _at_least(1, max_train_windows=max_train_windows, max_eval_windows=max_eval_windows)
        _at_least(0, num_workers=num_workers)
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
        self._tokens: dict[Split, Tensor] = {}
        self._tokens_of: PreTrainedTokenizerBase | None = None
        self._generated: dict[tuple[int, int], Tensor] = {}  # by seed and length

    def prepare_data(self) -> None:
        """Download hub datasets once, in one process per node. Evaluation alone does not download c4's train text.

        Raises:
            UserError: the dataset, its configuration or its split cannot be had.
        """
        evaluating = (TrainerFn.VALIDATING, TrainerFn.TESTING)
        self.texts.download(evaluation_only=self.trainer is not None and self.trainer.state.fn in evaluating)

    def setup(self, stage: str) -> None:
        """Forget what the model of an earlier run generated."""
        self._generated.clear()

    def state_dict(self) -> dict[str, Any]:
        """What the model has generated: a resumed run has the pruned model only, and goes on with the dense model's windows."""
        return {"generated": dict(self._generated)} if self._generated else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generated = dict(state_dict["generated"])

    def calibration_dataloader(self, num_samples: int = 128, seed: int | None = None) -> Windows:
        """Windows at uniformly random offsets of the train text, not shuffled further; with ``self``, generated windows.

        The first n windows of a longer draw with the same seed are the same windows.

        Args:
            num_samples: number of windows.
            seed: seed of the draw; without it, the module's.

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
            texts = repeat(tokens)
        windows = []
        for text in islice(texts, num_samples):
            # The authors' rule: the last possible offset, n - T, is never drawn.
            offset = rng.randint(0, len(text) - self.sequence_length - 1)
            windows.append(text[offset : offset + self.sequence_length])
        return self._loader(torch.stack(windows))

    def train_dataloader(self) -> Windows:
        """Consecutive windows of the train text, without the tokens left over, in a seeded random order, another each epoch.

        The order depends on the seed and the epoch only, and the loader notes in checkpoints how far it is: a resumed run sees
        the windows that it would have seen. Ranks take turns.

        For ``c4`` the text is the first shard's documents joined, as many as ``max_train_windows`` (or 10,000) need. For
        ``self`` they are generated; without ``max_train_windows`` there are none, and a run that asks for the first is stopped.

        Raises:
            UserError: no train text, or one shorter than a window; fine-tuning with ``self`` and no ``max_train_windows``.
        """
        if self.source != "self":
            windows = self._consecutive_windows("train", self.max_train_windows)
        elif self.max_train_windows is not None:
            windows = self._generated_windows(self.max_train_windows, self.seed)
        else:
            # Lightning wants a loader even for a run that only prunes. One that will train had better hear of it before it
            # spends its time on pruning.
            callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
            if any(getattr(callback, "finetune", False) for callback in callbacks):
                _refuse_training()
            return DataLoader(_WindowDataset(torch.empty(1, 0)), collate_fn=_refuse_training)
        world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        dataset = _WindowDataset(windows)
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, world, rank, shuffle=True, seed=self.seed)
        return ResumableLoader(
            dataset, self.batch_size, sampler=sampler, num_workers=self.num_workers, generator=torch.Generator()
        )

    def val_dataloader(self) -> Windows | list[Windows]:
        """The same windows as :meth:`test_dataloader`; with ``files`` or ``self`` and no ``test_files`` none: unvalidated."""
        if self.source in ("files", "self") and not self.texts.files["test"]:
            return []
        return self.test_dataloader()

    def test_dataloader(self) -> Windows:
        """Consecutive windows from the start of the evaluation text, in order, without the tokens left over.

        Raises:
            UserError: no evaluation text, or one shorter than a window.
        """
        return self._loader(self._consecutive_windows("test", self.max_eval_windows))

    def _get_tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.tokenizer is not None:
            return self.tokenizer
        module = None if self.trainer is None else self.trainer.lightning_module
        tokenizer: PreTrainedTokenizerBase | None = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise UserError(
                "TextDataModule needs a tokenizer, got none from its constructor and none from the trainer's module. "
                "Pass tokenizer=, a tokenizer or what the model is loaded from."
            )
        return tokenizer

    def _tokenise(self, text: str) -> Tensor:
        # verbose=False: a text longer than the model's context is the point here, not a mistake to warn of.
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
        """Shape (count, T), from the trainer's model; all ranks call it together."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if self.trainer is None or module is None:
            raise UserError(
                "source self generates windows with the model of a Trainer's module, got no such module. Pass the datamodule "
                "to trainer.fit, or call generate_windows with the model."
            )
        key = seed, self.sequence_length
        if len(self._generated.get(key, ())) < count:
            rank_zero_info(f"Generating {count} windows of {self.sequence_length} tokens with the model itself.")
            chosen = (getattr(callback, "model_attribute", None) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
            self._generated[key] = generate_windows(
                find_model(module, next(filter(None, chosen), None)),
                count,
                self.sequence_length,
                seed=seed,
                batch_size=self.batch_size,
                adapter=adapter_for(self.trainer),
            )
        return self._generated[key][:count]

    def _loader(self, windows: Tensor) -> Windows:
        # A generator of its own: an iterator draws a number from it, and dropout must not depend on how often one was made.
        return DataLoader(
            _WindowDataset(windows), self.batch_size, num_workers=self.num_workers, generator=torch.Generator()
        )


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader whose place in the text is part of a checkpoint, by Lightning's protocol for stateful loaders.

    It goes through the text epoch after epoch by its own count, and an iteration broken off is taken up where it stood:
    Lightning's count is one ahead in a checkpoint saved after ``max_steps`` ended a run, and it may begin an epoch twice.
    """

    _epoch = 0
    _taken = 0

    def __iter__(self) -> Any:
        self.load_state_dict(self.state_dict())
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(self._epoch)
        skipped = self._taken
        for index, batch in enumerate(super().__iter__()):
            if index >= skipped:
                self._taken = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were taken."""
        over = self._taken == len(self)  # nobody asks an iterator for more when its length is known
        return {"epoch": self._epoch + over, "batches": 0 if over else self._taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration goes on from there."""
        self._epoch, self._taken = state_dict["epoch"], state_dict["batches"]


class _WindowDataset(Dataset[dict[str, Tensor]]):
    """Rows of a (N, T) tensor as model inputs."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def _refuse_training(batch: Any = None) -> NoReturn:
    raise UserError(
        "source self has windows to train on only if max_train_windows says how many to generate, got none. Set "
        "max_train_windows, or give train text with another source."
    )


def _at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, got {value}. Write {minimum} or more.")
