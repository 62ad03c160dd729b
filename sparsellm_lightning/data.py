"""Text for calibration, retraining and perplexity, cut into windows of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.loading import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Table

Split = Literal["train", "test"]
Windows = DataLoader[dict[str, Tensor]]

# The column with the text, and what the SparseGPT authors put between the texts of each split.
BENCHMARKS: dict[str, tuple[str, dict[Split, str]]] = {
    "wikitext2": ("text", {"train": " ", "test": "\n\n"}),
    "ptb": ("sentence", {"train": " ", "test": " "}),
    "c4": ("text", {"train": " ", "test": " "}),
}
LOCAL_SOURCES = ("python-docs", "files")
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

C4_TEST_TEXTS = 1100
C4_TEST_WINDOWS = 256
C4_TRAIN_WINDOWS = 10_000
C4_MAX_DRAWS = 10_000
CHARACTERS_PER_TOKEN = 5


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

    A text is tokenised as a whole, with the tokenizer's defaults, on first use. Every item of every loader is
    ``{"input_ids": (T,), "labels": (T,)}``, int64 and equal; batches are ``(B, T)``.

    Args:
        source: ``wikitext2``, ``ptb``, ``c4``, ``python-docs``, ``files``, or the hub id of another dataset.
        sequence_length: tokens per window, T.
        batch_size: windows per batch.
        train_files: for source ``files``: ``.txt`` (one text, exactly as it is), ``.jsonl``, ``.json`` or ``.parquet``.
        test_files: likewise, for evaluation.
        text_field: column with the text, in ``.jsonl``, ``.json``, ``.parquet`` and other hub datasets.
        dataset_config: configuration name of another hub dataset.
        train_split: split of another hub dataset used for calibration and training.
        test_split: split of another hub dataset used for evaluation.
        max_train_windows: at most this many windows for training. Without it all, but 10,000 for ``c4``.
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
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.files: dict[Split, list[Path]] = {
            "train": _check_files("train_files", train_files),
            "test": _check_files("test_files", test_files),
        }
        self.text_field = text_field
        self.dataset_config = dataset_config
        self.splits: dict[Split, str] = {"train": train_split, "test": test_split}
        self.max_train_windows = max_train_windows
        self.max_eval_windows = max_eval_windows
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = tokenizer
        self._check_source()
        self._tokens: dict[Split, Tensor] = {}
        self._tokens_of: PreTrainedTokenizerBase | None = None

    def prepare_data(self) -> None:
        """Download hub datasets once, in one process per node. Evaluation alone does not download c4's train text.

        Raises:
            UserError: the dataset, its configuration or its split cannot be had.
        """
        if self.source in LOCAL_SOURCES:
            return
        if self.trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            self._table("test")
            return
        self._table("train")
        if self.source in BENCHMARKS:
            self._table("test")

    def calibration_dataloader(self, num_samples: int = 128, seed: int | None = None) -> Windows:
        """Windows at uniformly random offsets of the train text, not shuffled further.

        The first n windows of a longer draw with the same seed are the same windows.

        Args:
            num_samples: number of windows.
            seed: seed of the draw; without it, the module's.

        Raises:
            UserError: ``num_samples`` below 1, no train text, or a train text not longer than a window.
        """
        _at_least(1, num_samples=num_samples)
        rng = random.Random(self.seed if seed is None else seed)
        if self.source == "c4":
            draw = self._c4_document_drawer(rng)
        else:
            tokens = self._text_tokens("train")
            if len(tokens) <= self.sequence_length:
                raise UserError(
                    f"calibration needs a train text longer than sequence_length, got {len(tokens)} tokens and "
                    f"sequence_length {self.sequence_length}. Give more text or a smaller sequence_length."
                )

            def draw() -> Tensor:
                return tokens

        windows = []
        for _ in range(num_samples):
            text = draw()
            # The authors' rule: the last possible offset, n - T, is never drawn.
            offset = rng.randint(0, len(text) - self.sequence_length - 1)
            windows.append(text[offset : offset + self.sequence_length])
        return self._loader(torch.stack(windows))

    def train_dataloader(self) -> Windows:
        """Consecutive windows of the train text, without the tokens left over, in a seeded random order, another each epoch.

        The order depends on the seed and the epoch only, and the loader notes in checkpoints how far it is: a resumed run sees
        the windows that it would have seen. Ranks take turns.

        For ``c4`` the text is the first shard's documents joined, as many as ``max_train_windows`` (or 10,000) need.

        Raises:
            UserError: no train text, or one shorter than a window.
        """
        windows = self._consecutive_windows("train", self.max_train_windows)
        world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        dataset = _WindowDataset(windows)
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, world, rank, shuffle=True, seed=self.seed)
        return ResumableLoader(
            dataset, self.batch_size, sampler=sampler, num_workers=self.num_workers, generator=torch.Generator()
        )

    def val_dataloader(self) -> Windows | list[Windows]:
        """The same windows as :meth:`test_dataloader`; none with ``files`` and no ``test_files``, which trains unvalidated."""
        if self.source == "files" and not self.files["test"]:
            return []
        return self.test_dataloader()

    def test_dataloader(self) -> Windows:
        """Consecutive windows from the start of the evaluation text, in order, without the tokens left over.

        Raises:
            UserError: no evaluation text, or one shorter than a window.
        """
        return self._loader(self._consecutive_windows("test", self.max_eval_windows))

    def _check_source(self) -> None:
        known = f"{', '.join((*BENCHMARKS, *LOCAL_SOURCES))} or a hub dataset id"
        if Path(self.source).is_file():
            raise UserError(
                f"source must be {known}, got the file {self.source}. "
                "Write source: files and name it in train_files or test_files."
            )
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.source):
            raise UserError(f"source must be {known}, got {self.source!r}. Write one of these.")
        has_files = any(self.files.values())
        if self.source == "files" and not has_files:
            raise UserError(
                "source files needs train_files or test_files, got neither. Name at least one .txt, .jsonl, .json or "
                ".parquet file."
            )
        if self.source != "files" and has_files:
            raise UserError(
                f"train_files and test_files are read only with source files, got source {self.source}. "
                "Write source: files, or leave the files out."
            )
        if self.source not in BENCHMARKS and self.source not in LOCAL_SOURCES:
            return
        hub_only = {
            "dataset_config": (self.dataset_config, None),
            "train_split": (self.splits["train"], "train"),
            "test_split": (self.splits["test"], "test"),
        }
        if self.source != "files":
            hub_only["text_field"] = (self.text_field, "text")
        for name, (value, default) in hub_only.items():
            if value != default:
                raise UserError(f"{name} has no meaning with source {self.source}, got {value}. Leave it out.")

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
            is_c4_train = (self.source, split) == ("c4", "train")
            self._tokens[split] = self._c4_train_tokens() if is_c4_train else self._tokenise(self._text(split))
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

    def _loader(self, windows: Tensor) -> Windows:
        # A generator of its own: an iterator draws a number from it, and dropout must not depend on how often one was made.
        return DataLoader(
            _WindowDataset(windows), self.batch_size, num_workers=self.num_workers, generator=torch.Generator()
        )

    def _text(self, split: Split) -> str:
        if self.source == "python-docs":
            return _python_docs(split)
        if self.source == "files":
            if not self.files[split]:
                purpose = "calibration and training need" if split == "train" else "evaluation needs"
                raise UserError(f"with source files, {purpose} {split}_files, got none. Name at least one file.")
            return "\n\n".join(text for path in self.files[split] for text in _read_file(path, self.text_field))
        table = self._table(split)
        if self.source == "c4":
            table = table.select(range(min(C4_TEST_TEXTS, len(table))))
        field, separators = BENCHMARKS.get(self.source, (self.text_field, {"train": "\n\n", "test": "\n\n"}))
        return separators[split].join(_column(table, field, self.source))

    def _table(self, split: Split) -> Table:
        """The rows of a hub dataset, from the disk cache after the first time."""
        if self.source == "ptb":
            # The repository itself holds a script, which datasets no longer runs.
            file = f"penn_treebank/{split}/0000.parquet"
            return _hub_file("parquet", "ptb-text-only/ptb_text_only", file, revision="refs/convert/parquet")
        if self.source == "c4":
            shard = "en/c4-train.00000-of-01024" if split == "train" else "en/c4-validation.00000-of-00008"
            return _hub_file("json", "allenai/c4", f"{shard}.json.gz")
        if self.source == "wikitext2":
            return _load_table("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return _load_table(self.source, self.dataset_config, split=self.splits[split])

    def _c4_document_drawer(self, rng: random.Random) -> Callable[[], Tensor]:
        """Draws the tokens of a random document of c4's first shard that is longer than a window."""
        table = self._table("train")

        def draw() -> Tensor:
            longest = 0
            for _ in range(C4_MAX_DRAWS):
                tokens = self._tokenise(table[rng.randint(0, len(table) - 1)]["text"])
                if len(tokens) > self.sequence_length:
                    return tokens
                longest = max(longest, len(tokens))
            raise UserError(
                f"calibration with c4 needs documents longer than sequence_length, got at most {longest} tokens in "
                f"{C4_MAX_DRAWS} documents and sequence_length {self.sequence_length}. Give a smaller sequence_length."
            )

        return draw

    def _c4_train_tokens(self) -> Tensor:
        """Tokens of as many documents, joined, as the training windows need."""
        table = self._table("train")
        needed = (self.max_train_windows or C4_TRAIN_WINDOWS) * self.sequence_length
        characters = needed * CHARACTERS_PER_TOKEN
        while True:
            texts, length = [], 0
            for row in table:
                texts.append(row["text"])
                length += len(row["text"]) + 1
                if length >= characters:
                    break
            tokens = self._tokenise(" ".join(texts))
            # More than needed, so that the last window does not depend on where the text was cut.
            if len(tokens) > needed or len(texts) == len(table):
                return tokens[:needed]
            characters *= 2


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


def _at_least(minimum: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, got {value}. Write {minimum} or more.")


def _check_files(name: str, files: Sequence[str] | str | None) -> list[Path]:
    paths = [Path(file).expanduser() for file in ([files] if isinstance(files, str) else files or [])]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{name} must be existing files, but there is no file {path}. Correct the path.")
        if path.suffix != ".txt" and path.suffix not in TABLE_BUILDERS:
            kinds = ", ".join((".txt", *TABLE_BUILDERS))
            raise UserError(f"{name} must end in one of {kinds}, got {path}. Convert or rename the file.")
    return paths


def _python_docs(split: Split) -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some minimal Python builds leave it out
        raise UserError(
            "source python-docs needs the standard module pydoc_data, which this Python lacks. Use another source."
        ) from error
    names = sorted(topics)
    chosen = [name for index, name in enumerate(names) if (index % 5 == 0) == (split == "test")]
    return "\n\n".join(topics[name] for name in chosen)


def _read_file(path: Path, text_field: str) -> Iterable[str]:
    if path.suffix in TABLE_BUILDERS:
        return _column(_load_table(TABLE_BUILDERS[path.suffix], data_files=str(path), split="train"), text_field, path)
    try:
        # Bytes, because text mode would change line ends.
        return [path.read_bytes().decode("utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(f".txt files must be UTF-8, but {path} is not: {error}. Convert the file.") from error


def _column(table: Table, field: str, origin: str | Path) -> Iterable[str]:
    if field not in table.column_names:
        raise UserError(
            f"text_field must be a field of {origin}, got {field}; the fields are {', '.join(table.column_names)}. "
            "Write text_field with one of these."
        )
    texts: Iterable[str] = table[field]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"field {field} of {origin} must be text, got {text!r:.60} in row {row}. Correct the data.")
    return texts


def _hub_file(builder: str, repository: str, file: str, revision: str | None = None) -> Table:
    """One file of a hub dataset, read by a builder of ``datasets``.

    Loading the repository by name with ``data_files`` compares the file with the split sizes of the whole dataset and
    fails; and a file in the hub's cache is found again without a network.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except OSError as error:
        raise _unavailable(f"{repository}/{file}", error) from error
    return _load_table(builder, data_files=path, split="train")


def _load_table(name: str, config: str | None = None, **kwargs: Any) -> Table:
    import datasets  # slow to import, and not needed for python-docs or .txt

    try:
        table: Table = datasets.load_dataset(name, config, **kwargs)
    # StopIteration: how the json builder says that a file is empty.
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise _unavailable(kwargs.get("data_files", name), error) from error
    return table


def _unavailable(name: str, error: Exception) -> UserError:
    cause = " ".join(str(error.__cause__ or error).split()).rstrip(".") or type(error).__name__
    return UserError(
        f"the text must be a dataset that can be read, got {name}: {cause}. Check the name, the configuration, the "
        "split and the network; the sources python-docs and files need no network."
    )
