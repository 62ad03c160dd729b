"""Sources of text: the benchmarks of the SparseGPT papers, other hub datasets, files, and Python's documentation."""

from __future__ import annotations

import glob
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sparsellm_lightning.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset as Table

Split = Literal["train", "test"]
Tokenise = Callable[[str], Tensor]

# The column with the text, and the separator that the SparseGPT authors put between the texts of each split.
BENCHMARKS: dict[str, tuple[str, dict[Split, str]]] = {
    "wikitext2": ("text", {"train": " ", "test": "\n\n"}),
    "ptb": ("sentence", {"train": " ", "test": " "}),
    "c4": ("text", {"train": " ", "test": " "}),
}
LOCAL_SOURCES = ("python-docs", "files", "self")
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

C4_TEST_TEXTS = 1100
C4_MAX_DRAWS = 10_000
CHARACTERS_PER_TOKEN = 5


@dataclass(frozen=True)
class TextSource:
    """One source of text, with a train and a test split.

    Args:
        name: a benchmark, a local source, or the hub id of another dataset.
        files: of each split, for source ``files``. Source ``self`` uses those of the test split.
        text_field: column with the text in other tables than the benchmarks'.
        config: configuration name of another hub dataset.
        splits: names of the two splits in another hub dataset.

    Raises:
        UserError: an impossible name, or settings that do not belong to the source.
    """

    name: str
    files: dict[Split, list[Path]]
    text_field: str
    config: str | None
    splits: dict[Split, str]

    def __post_init__(self) -> None:
        known = f"{', '.join((*BENCHMARKS, *LOCAL_SOURCES))} or a hub dataset id"
        if Path(self.name).is_file():
            raise UserError(
                f"source must be {known}, got the file {self.name}. "
                "Write source: files and name it in train_files or test_files."
            )
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.name):
            raise UserError(f"source must be {known}, got {self.name!r}. Write one of these.")
        self._check_files()
        if self.name not in BENCHMARKS and self.name not in LOCAL_SOURCES:
            return
        hub_only = {
            "dataset_config": (self.config, None),
            "train_split": (self.splits["train"], "train"),
            "test_split": (self.splits["test"], "test"),
        }
        if self.name not in ("files", "self"):
            hub_only["text_field"] = (self.text_field, "text")
        for name, (value, default) in hub_only.items():
            if value != default:
                raise UserError(f"{name} has no meaning with source {self.name}, got {value}. Leave it out.")

    def _check_files(self) -> None:
        has_files = any(self.files.values())
        same = [file for file in self.files["test"] if file in self.files["train"]]
        if same:
            rank_zero_warn(f"test_files has {same[0]}, which train_files has too: the model is fitted to it.")
        if self.name == "files" and not has_files:
            raise UserError(
                "source files needs train_files or test_files, got neither. Name at least one .txt, .jsonl, .json or "
                ".parquet file."
            )
        if self.name == "self" and self.files["train"]:
            raise UserError(
                f"train_files have no meaning with source self, whose windows the model generates, got "
                f"{self.files['train'][0]}. Leave them out, or write source: files."
            )
        if self.name not in ("files", "self") and has_files:
            raise UserError(
                "train_files and test_files are read only with source files (test_files with source self too), got source "
                f"{self.name}. Write source: files, or leave the files out."
            )

    def download(self, *, evaluation_only: bool) -> None:
        """Download a hub dataset into the disk cache. Evaluation does not need c4's train text.

        Raises:
            UserError: the dataset, its configuration or its split is not available.
        """
        if self.name in LOCAL_SOURCES:
            return
        if not evaluation_only:
            self.table("train")
        if evaluation_only or self.name in BENCHMARKS:
            self.table("test")

    def text(self, split: Split) -> str:
        """The whole text of a split. Not for the train texts of ``c4`` (too long) and of ``self`` (there is none).

        Raises:
            UserError: there is no text, or it cannot be read.
        """
        if self.name == "python-docs":
            return _python_docs(split)
        if self.name in ("files", "self"):
            if not self.files[split]:
                purpose = "calibration and training need" if split == "train" else "evaluation needs"
                raise UserError(f"with source {self.name}, {purpose} {split}_files, got none. Name at least one file.")
            return "\n\n".join(text for path in self.files[split] for text in _read_file(path, self.text_field))
        table = self.table(split)
        if self.name == "c4":
            table = table.select(range(min(C4_TEST_TEXTS, len(table))))
        field, separators = BENCHMARKS.get(self.name, (self.text_field, {"train": "\n\n", "test": "\n\n"}))
        return separators[split].join(_column(table, field, self.name))

    def table(self, split: Split) -> Table:
        """The rows of a hub dataset. After the first time they come from the disk cache.

        Raises:
            UserError: the dataset is not available.
        """
        if self.name == "ptb":
            # The repository's main branch holds a script, which datasets no longer runs.
            file = f"penn_treebank/{split}/0000.parquet"
            return _hub_file("parquet", "ptb-text-only/ptb_text_only", file, revision="refs/convert/parquet")
        if self.name == "c4":
            shard = "en/c4-train.00000-of-01024" if split == "train" else "en/c4-validation.00000-of-00008"
            return _hub_file("json", "allenai/c4", f"{shard}.json.gz")
        if self.name == "wikitext2":
            return _load_table("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return _load_table(self.name, self.config, split=self.splits[split])


def c4_documents(table: Table, length: int, tokenise: Tokenise, rng: random.Random) -> Iterator[Tensor]:
    """Tokens of random documents longer than ``length``, each of shape (n,), drawn one at a time.

    Raises:
        UserError: no such document in ``C4_MAX_DRAWS`` draws.
    """
    while True:
        longest = 0
        for _ in range(C4_MAX_DRAWS):
            tokens = tokenise(table[rng.randint(0, len(table) - 1)]["text"])
            if len(tokens) > length:
                break
            longest = max(longest, len(tokens))
        else:
            raise UserError(
                f"calibration with c4 needs documents longer than sequence_length, got at most {longest} tokens in "
                f"{C4_MAX_DRAWS} documents and sequence_length {length}. Give a smaller sequence_length."
            )
        yield tokens


def c4_train_tokens(table: Table, needed: int, tokenise: Tokenise) -> Tensor:
    """The first ``needed`` tokens of the joined documents, shape (needed,), or all tokens if there are fewer."""
    characters = needed * CHARACTERS_PER_TOKEN
    while True:
        texts, length = [], 0
        for row in table:
            texts.append(row["text"])
            length += len(row["text"]) + 1
            if length >= characters:
                break
        tokens = tokenise(" ".join(texts))
        # The last tokens depend on where the text was cut, so they must lie behind the needed ones.
        if len(tokens) > needed or len(texts) == len(table):
            return tokens[:needed]
        characters *= 2


def check_files(name: str, files: Sequence[str | Path] | str | Path | None) -> list[Path]:
    """The paths in the setting ``name``.

    Raises:
        UserError: a missing file, or a file of an unknown kind.
    """
    paths = [Path(file).expanduser() for file in ([files] if isinstance(files, (str, Path)) else files or [])]
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
        try:
            table = _load_dataset(TABLE_BUILDERS[path.suffix], data_files=glob.escape(str(path)), split="train")
        except Exception as error:  # builders fail in many ways
            raise UserError(
                f"{path.suffix} files must be tables that can be read, but reading {path} fails: {_cause(error)}. "
                "Correct the file."
            ) from error
        return _column(table, text_field, path)
    try:
        # Read as bytes, because text mode changes line ends. A byte order mark is no text.
        return [path.read_bytes().decode("utf-8-sig")]
    except OSError as error:
        raise UserError(
            f".txt files must be readable, but reading {path} fails ({error}). Correct its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f".txt files must be UTF-8, but {path} is not: {error}. Convert the file.") from error


def _column(table: Table, field: str, origin: str | Path) -> Iterable[str]:
    if field not in table.column_names:
        raise UserError(
            f"text_field must be a field of {origin}, got {field}; the fields are {', '.join(table.column_names)}. "
            "Write text_field with one of these."
        )
    texts: Iterable[str] = table[field]
    try:
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(
                    f"field {field} of {origin} must be text, got {text!r:.60} in row {row}. Correct the data."
                )
    except UnicodeDecodeError as error:  # builders do not look at the encoding
        raise UserError(f"{origin} must be UTF-8, but is not: {error}. Convert it.") from error
    return texts


def _hub_file(builder: str, repository: str, file: str, revision: str | None = None) -> Table:
    """One file of a hub dataset, read by a builder of ``datasets``.

    Loading the repository by name with ``data_files`` would fail, because it compares the file with the split sizes of the
    whole dataset. A file in the hub's cache is found without a network.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except Exception as error:  # networks fail in many ways
        raise _unavailable(f"{repository}/{file}", error) from error
    return _load_table(builder, data_files=path, split="train")


def _load_table(name: str, config: str | None = None, **kwargs: Any) -> Table:
    try:
        return _load_dataset(name, config, **kwargs)
    except Exception as error:  # networks and builders fail in many ways
        raise _unavailable(kwargs.get("data_files", name), error) from error


def _load_dataset(*args: Any, **kwargs: Any) -> Table:
    import datasets  # slow to import, and not needed for python-docs or .txt

    table: Table = datasets.load_dataset(*args, **kwargs)  # nosec B615
    return table


def _unavailable(name: str, error: Exception) -> UserError:
    return UserError(
        f"the text must be a dataset that can be read, got {name}: {_cause(error)}. Check the name, the configuration, the "
        "split and the network; the sources python-docs, files and self need no network."
    )


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
