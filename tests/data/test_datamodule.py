"""The datamodule. The reference is the SparseGPT authors' loops, written out again with the global ``random`` module."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsellm_lightning import CausalLM
from sparsellm_lightning.data import TextDataModule, take_windows
from sparsellm_lightning.data.loaders import Windows
from sparsellm_lightning.data.sources import C4_MAX_DRAWS
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import Ranks

LETTERS = "abcdefghij"


def _words(count: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(LETTERS) for _ in range(count))


def _fast(tokenizer: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and per newline. The declared context is 4 tokens, so that longer texts would warn."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    tokenizer.train_from_iterator([f"{' '.join(LETTERS)}\n"], trainers.WordLevelTrainer(special_tokens=["?"]))
    return _fast(tokenizer, unk_token="?", model_max_length=4)


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(_words(103, seed=1))
    return str(path)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def _rows(loader: Windows) -> Tensor:
    """All windows, after checking the form of every batch."""
    batches = list(loader)
    assert all(set(batch) == {"input_ids", "labels"} for batch in batches)
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)
    return torch.cat([batch["input_ids"] for batch in batches])


def _module(tokenizer: PreTrainedTokenizerFast | None, **kwargs: Any) -> TextDataModule:
    return TextDataModule(sequence_length=8, batch_size=3, tokenizer=tokenizer, **kwargs)


# --- the authors' protocol ---


class Hub:
    """Replaces the hub: tables by the arguments of ``load_dataset``, and files by name. Remembers the requests."""

    def __init__(self) -> None:
        self.tables: dict[tuple[str, str | None, str], dict[str, list[str]]] = {}
        self.files: dict[str, dict[str, list[str]]] = {}
        self.asked: list[Any] = []

    def load_dataset(
        self, path: str, name: str | None = None, *, split: str, data_files: str | None = None
    ) -> datasets.Dataset:
        if data_files is not None:
            assert split == "train"
            assert path == ("parquet" if data_files.endswith(".parquet") else "json")
            return datasets.Dataset.from_dict(self.files[data_files])
        self.asked.append((path, name, split))
        return datasets.Dataset.from_dict(self.tables[path, name, split])

    def hf_hub_download(self, repository: str, file: str, *, repo_type: str, revision: str | None) -> str:
        assert repo_type == "dataset"
        path = f"{repository}@{revision}/{file}"
        self.asked.append(path)
        return path


PTB = "ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/"
C4_TRAIN = "allenai/c4@None/en/c4-train.00000-of-01024.json.gz"
C4_TEST = "allenai/c4@None/en/c4-validation.00000-of-00008.json.gz"


def _wikitext(split: str) -> tuple[str, str, str]:
    return "Salesforce/wikitext", "wikitext-2-raw-v1", split


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    texts = {split: [_words(7 + i % 5, seed=10 * i + len(split)) for i in range(20)] for split in ("train", "test")}
    for split in ("train", "test"):
        hub.tables[_wikitext(split)] = {"text": ["", *texts[split]]}
        hub.files[f"{PTB}{split}/0000.parquet"] = {"sentence": texts[split]}
    hub.files[C4_TRAIN] = {"text": [_words(i % 15 + 1, seed=i) for i in range(40)]}
    hub.files[C4_TEST] = {"text": [_words(3, seed=i) for i in range(1200)]}
    hub.tables["some/set", "config", "dev"] = {"body": texts["test"]}
    hub.tables["some/set", "config", "train"] = {"body": texts["train"]}
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    return hub


def _authors_windows(ids: Tensor, nsamples: int, seed: int, seqlen: int) -> Tensor:
    random.seed(seed)
    found = []
    for _ in range(nsamples):
        i = random.randint(0, ids.shape[0] - seqlen - 1)
        found.append(ids[i : i + seqlen])
    return torch.stack(found)


@pytest.mark.parametrize("source", ["wikitext2", "ptb"])
def test_wikitext2_and_ptb_protocol(source: str, hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    if source == "wikitext2":
        train = " ".join(hub.tables[_wikitext("train")]["text"])
        test = "\n\n".join(hub.tables[_wikitext("test")]["text"])
    else:
        train, test = (" ".join(hub.files[f"{PTB}{split}/0000.parquet"]["sentence"]) for split in ("train", "test"))
    module = _module(tokenizer, source=source, seed=3)
    expected = _authors_windows(_ids(tokenizer, train), 11, seed=3, seqlen=8)
    assert torch.equal(_rows(module.calibration_dataloader(11)), expected)
    ids = _ids(tokenizer, test)
    nsamples = ids.numel() // 8
    assert torch.equal(_rows(module.test_dataloader()), torch.stack([ids[8 * i : 8 * i + 8] for i in range(nsamples)]))


def test_c4_protocol(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = hub.files[C4_TRAIN]["text"]
    random.seed(5)
    expected = []
    for _ in range(12):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = _ids(tokenizer, documents[i])
            if ids.shape[0] > 8:
                break
        i = random.randint(0, ids.shape[0] - 8 - 1)
        expected.append(ids[i : i + 8])
    module = _module(tokenizer, source="c4")
    assert torch.equal(_rows(module.calibration_dataloader(12, seed=5)), torch.stack(expected))

    evaluation = _ids(tokenizer, " ".join(hub.files[C4_TEST]["text"][:1100]))
    assert evaluation.shape[0] == 3300
    assert torch.equal(_rows(module.test_dataloader()).flatten(), evaluation[: 256 * 8])


def test_c4_train_windows(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    # With two characters per token the first estimate of the number of documents suffices. With twenty it does not.
    for texts in ([_words(15, seed=i) for i in range(40)], ["abcdefghijabcdefghij " * 5] * 40):
        hub.files[C4_TRAIN]["text"] = texts
        ids = _ids(tokenizer, " ".join(texts))
        for limit in (1, 5, None):
            module = _module(tokenizer, source="c4", max_train_windows=limit)
            windows = _rows(module.train_dataloader())
            count = limit or len(ids) // 8
            assert _as_set(windows) == _as_set(ids[: 8 * count].view(count, 8))
            assert len(windows) == count


def test_c4_gives_up_without_a_long_document(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    hub.files[C4_TRAIN]["text"] = ["a b", "a b c d e f g h"]
    with pytest.raises(UserError, match=f"at most 8 tokens in {C4_MAX_DRAWS} documents and sequence_length 8"):
        _module(tokenizer, source="c4").calibration_dataloader(1)


def test_other_hub_dataset(hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"source": "some/set", "dataset_config": "config", "test_split": "dev"}
    module = _module(tokenizer, text_field="body", **options)
    ids = _ids(tokenizer, "\n\n".join(hub.tables["some/set", "config", "dev"]["body"]))
    assert torch.equal(_rows(module.val_dataloader()).flatten(), ids[: len(ids) // 8 * 8])
    assert hub.asked == [("some/set", "config", "dev")]
    with pytest.raises(UserError, match="got text; the fields are body"):
        _module(tokenizer, **options).val_dataloader()


def test_hub_failure_is_a_user_error(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for source in ("nobody/no-such-set", "wikitext2", "ptb", "c4"):
        with pytest.raises(UserError, match="must be a dataset that can be read, got ") as caught:
            _module(tokenizer, source=source).prepare_data()
        assert "\n" not in str(caught.value)


def test_prepare_data_gets_both_texts(hub: Hub) -> None:
    _module(None, source="c4").prepare_data()
    assert hub.asked == [C4_TRAIN, C4_TEST]
    _module(None, source="python-docs").prepare_data()
    assert len(hub.asked) == 2


def test_prepare_data_for_evaluation_gets_its_text_only(hub: Hub, trainer: Trainer) -> None:
    module = _module(None, source="c4")
    module.trainer = trainer
    trainer.state.fn = TrainerFn.VALIDATING
    module.prepare_data()
    assert hub.asked == [C4_TEST]


# --- windows ---


def _as_set(windows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(window.tolist()) for window in windows}


def test_calibration_windows(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    module = _module(tokenizer, source="files", train_files=text_file, seed=2)
    windows = _rows(module.calibration_dataloader(50))
    ids = _ids(tokenizer, Path(text_file).read_text())
    assert torch.equal(windows, _authors_windows(ids, 50, seed=2, seqlen=8))
    assert torch.equal(_rows(module.calibration_dataloader(20)), windows[:20])
    assert torch.equal(_rows(module.calibration_dataloader(50, seed=2)), windows)
    assert not torch.equal(_rows(module.calibration_dataloader(50, seed=3)), windows)
    assert len(_rows(module.calibration_dataloader())) == 128


def test_calibration_needs_one_token_more_than_a_window(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for count in (8, 9):
        (tmp_path / f"{count}.txt").write_text(_words(count, seed=0))
    module = _module(tokenizer, source="files", train_files=str(tmp_path / "8.txt"))
    with pytest.raises(UserError, match="got 8 tokens and sequence_length 8"):
        module.calibration_dataloader()
    assert len(_rows(module.train_dataloader())) == 1
    module = _module(tokenizer, source="files", train_files=str(tmp_path / "9.txt"))
    with pytest.warns(UserWarning, match="4 calibration windows of 8 tokens are drawn from a text of 9: they overlap"):
        assert len(_as_set(_rows(module.calibration_dataloader(4)))) == 1


def test_text_that_is_fitted_and_evaluated_is_named(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    with pytest.warns(UserWarning, match="which train_files has too"):
        _module(tokenizer, source="files", train_files=[text_file], test_files=text_file)


def test_a_byte_order_mark_is_no_text(tokenizer: PreTrainedTokenizerFast, text_file: str, tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + Path(text_file).read_bytes())
    marked, plain = (
        _rows(_module(tokenizer, source="files", test_files=str(file)).test_dataloader())
        for file in (tmp_path / "marked.txt", text_file)
    )
    assert torch.equal(marked, plain)


def test_a_file_that_cannot_be_read(
    tokenizer: PreTrainedTokenizerFast, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _module(tokenizer, source="files", test_files=text_file)
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError("not yours")))
    with pytest.raises(UserError, match=r"must be readable, but reading .* fails \(not yours\)"):
        module.test_dataloader()


def test_calibration_needs_a_sample(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    with pytest.raises(UserError, match="num_samples must be at least 1, got 0"):
        _module(tokenizer, source="files", train_files=text_file).calibration_dataloader(0)


@pytest.mark.parametrize(("limit", "count"), [(None, 12), (5, 5), (50, 12)])
def test_consecutive_windows(tokenizer: PreTrainedTokenizerFast, text_file: str, limit: int | None, count: int) -> None:
    ids = _ids(tokenizer, Path(text_file).read_text())
    expected = torch.stack([ids[start : start + 8] for start in range(0, 8 * count, 8)])
    module = _module(tokenizer, source="files", test_files=text_file, max_eval_windows=limit)
    assert torch.equal(_rows(module.test_dataloader()), expected)
    assert torch.equal(_rows(module.val_dataloader()), expected)

    module = _module(tokenizer, source="files", train_files=text_file, max_train_windows=limit)
    shuffled = _rows(module.train_dataloader())
    assert not torch.equal(shuffled, expected)
    assert sorted(shuffled.tolist()) == sorted(expected.tolist())


def test_train_order_is_seeded(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    def epochs(seed: int) -> list[Tensor]:
        loader = _module(tokenizer, source="files", train_files=text_file, seed=seed).train_dataloader()
        return [_rows(loader), _rows(loader)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_short_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b c")
    files = str(tmp_path / "short.txt")
    module = _module(tokenizer, source="files", train_files=files, test_files=files)
    for make in (module.test_dataloader, module.train_dataloader):
        with pytest.raises(UserError, match="got 3 tokens and sequence_length 8"):
            make()


# --- files and the built-in text ---


def _write(folder: Path, kind: str, texts: list[str]) -> str:
    path = folder / f"texts{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))}).to_parquet(path)
    else:
        path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_tables(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text_file: str, kind: str) -> None:
    texts = [f"{_words(20, seed=i)} " for i in range(3)]
    files = [_write(tmp_path, kind, texts), text_file]
    module = _module(tokenizer, source="files", test_files=files)
    ids = _ids(tokenizer, "\n\n".join([*texts, Path(text_file).read_text()]))
    assert torch.equal(_rows(module.test_dataloader()).flatten(), ids[: len(ids) // 8 * 8])

    module = _module(tokenizer, source="files", test_files=files, text_field="body")
    with pytest.raises(UserError, match="got body; the fields are text, id"):
        module.test_dataloader()
    module = _module(tokenizer, source="files", test_files=files, text_field="id")
    with pytest.raises(UserError, match="must be text, got 0 in row 0"):
        module.test_dataloader()


def test_names_of_files_are_no_patterns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """``part[1].jsonl`` is not ``part1.jsonl``. A single Path will do."""
    for name, text in (("part1", "another"), ("part[1]", "its own")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    module = _module(tokenizer, source="files", train_files=tmp_path / "part[1].jsonl")
    assert module.texts.text("train") == "its own"


def test_a_split_of_another_name_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    module = _module(tokenizer, source="some/set", test_split="validation")
    assert module.evaluation_text == "some/set, validation split"
    assert module.calibration_text == "some/set, train split"


def test_text_file_is_read_exactly(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "crlf.txt").write_bytes("a\r\n é\r".encode())
    module = _module(tokenizer, source="files", train_files=str(tmp_path / "crlf.txt"))
    assert module.texts.text("train") == "a\r\n é\r"
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="must be UTF-8"):
        _module(tokenizer, source="files", train_files=str(tmp_path / "latin.txt")).train_dataloader()


@pytest.mark.parametrize("content", ["", '{"text": "a"}\nnot json\n'])
def test_broken_table(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"reading .*broken\.jsonl fails: .+ Correct the file\."):
        _module(tokenizer, source="files", train_files=str(path)).train_dataloader()


def test_table_in_another_encoding(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl must be UTF-8"):
        _module(tokenizer, source="files", train_files=str(path)).train_dataloader()


def test_python_docs() -> None:
    module = _module(None)
    test_names = sorted(topics)[::5]
    assert module.texts.text("test") == "\n\n".join(topics[name] for name in test_names)
    assert module.texts.text("train") == "\n\n".join(topics[name] for name in sorted(topics) if name not in test_names)


# --- the tokenizer ---


class _Owner(LightningModule):
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer


@pytest.fixture
def trainer(tokenizer: PreTrainedTokenizerFast) -> Trainer:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy._lightning_module = _Owner(tokenizer)
    return trainer


def test_tokenizer_of_the_trainers_module(tokenizer: PreTrainedTokenizerFast, trainer: Trainer, text_file: str) -> None:
    module = _module(None, source="files", test_files=text_file)
    with pytest.raises(UserError, match="needs a tokenizer"):
        module.test_dataloader()
    module.trainer = trainer
    expected = _module(tokenizer, source="files", test_files=text_file)
    assert torch.equal(_rows(module.test_dataloader()), _rows(expected.test_dataloader()))


def test_tokenizer_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text_file: str) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama"}')
    module = TextDataModule(
        "files", sequence_length=8, batch_size=3, test_files=text_file, tokenizer=str(tmp_path / "saved")
    )
    assert module.tokenizer == str(tmp_path / "saved")
    expected = _module(tokenizer, source="files", test_files=text_file)
    assert torch.equal(_rows(module.test_dataloader()), _rows(expected.test_dataloader()))


def test_only_what_is_asked_for_is_tokenised_once(
    tokenizer: PreTrainedTokenizerFast, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(_words(40, seed=9))
    seen: list[str] = []
    call = PreTrainedTokenizerFast.__call__

    def spy(self: PreTrainedTokenizerFast, text: str, **kwargs: Any) -> Any:
        seen.append(text)
        return call(self, text, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", spy)
    module = _module(tokenizer, source="files", train_files=text_file, test_files=str(other))
    assert seen == []
    module.test_dataloader()
    module.val_dataloader()
    assert seen == [other.read_text()]
    module.train_dataloader()
    module.calibration_dataloader()
    assert seen == [other.read_text(), Path(text_file).read_text()]


def test_no_length_warning(tokenizer: PreTrainedTokenizerFast, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda text, *_: warned.append(text))
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})  # it warns once per tokenizer
    module = _module(tokenizer, source="files", test_files=text_file)
    module.test_dataloader()
    assert warned == []
    tokenizer(Path(text_file).read_text())
    assert len(warned) == 1


def test_special_tokens_are_the_tokenizers_own(text_file: str) -> None:
    inner = Tokenizer(models.WordLevel({"<s>": 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}, "<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    module = _module(_fast(inner), source="files", test_files=text_file)
    windows = _rows(module.test_dataloader())
    assert windows[0, 0] == 0
    assert (windows == 0).sum() == 1


def test_pickle(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    module = _module(tokenizer, source="files", test_files=text_file)
    before = _rows(pickle.loads(pickle.dumps(module)).test_dataloader())
    windows = _rows(module.test_dataloader())
    assert torch.equal(before, windows)
    assert torch.equal(_rows(pickle.loads(pickle.dumps(module)).test_dataloader()), windows)


# --- bad settings ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_length", 0),
        ("batch_size", -1),
        ("max_train_windows", 0),
        ("max_eval_windows", 0),
        ("num_workers", -1),
    ],
)
def test_numbers_out_of_range(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least [012], got {value}"):
        TextDataModule(**{name: value})  # type: ignore[arg-type]


def test_workers(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    data = _module(tokenizer, source="files", train_files=text_file, test_files=text_file, num_workers=1)
    for loader in (data.train_dataloader(), data.calibration_dataloader(2), data.test_dataloader()):
        assert loader.num_workers == 1


@pytest.mark.parametrize("source", ["", "a/b/c", "two words", "../texts"])
def test_impossible_source(source: str) -> None:
    with pytest.raises(
        UserError, match="source must be wikitext2, ptb, c4, python-docs, files, self or a hub dataset id"
    ):
        TextDataModule(source)


def test_source_that_is_a_file(text_file: str) -> None:
    with pytest.raises(UserError, match="Write source: files"):
        TextDataModule(text_file)


def test_files_and_source_must_agree(text_file: str) -> None:
    with pytest.raises(UserError, match="needs train_files or test_files"):
        TextDataModule("files")
    for source in ("python-docs", "wikitext2", "some/set"):
        with pytest.raises(UserError, match=f"got source {source}. Write source: files"):
            TextDataModule(source, train_files=text_file)


def test_files_of_source_self(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    with pytest.raises(UserError, match="train_files have no meaning with source self"):
        TextDataModule("self", train_files=text_file)
    windows = _rows(_module(tokenizer, source="self", test_files=text_file).val_dataloader())
    assert torch.equal(windows, _rows(_module(tokenizer, source="files", test_files=text_file).test_dataloader()))
    module = _module(None, source="self")
    assert module.val_dataloader() == []
    with pytest.raises(UserError, match="with source self, evaluation needs test_files"):
        _module(tokenizer, source="self").test_dataloader()


def test_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_files must be existing files, but there is no file .*none\.txt"):
        TextDataModule("files", train_files=[str(tmp_path / "none.txt")])
    (tmp_path / "table.csv").touch()
    with pytest.raises(UserError, match=r"test_files must end in one of \.txt, \.jsonl, \.json, \.parquet, got .*csv"):
        TextDataModule("files", test_files=str(tmp_path / "table.csv"))


def test_files_of_the_other_split(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    with pytest.raises(UserError, match="evaluation needs test_files"):
        _module(tokenizer, source="files", train_files=text_file).test_dataloader()
    with pytest.raises(UserError, match="calibration and training need train_files"):
        _module(tokenizer, source="files", test_files=text_file).calibration_dataloader()


@pytest.mark.parametrize(
    "extra", [{"dataset_config": "x"}, {"train_split": "x"}, {"test_split": "x"}, {"text_field": "x"}]
)
def test_settings_of_another_source(extra: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(extra))} has no meaning with source wikitext2, got x"):
        TextDataModule("wikitext2", **extra)


def test_settings_that_differ_from_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("text")
    data = TextDataModule("files", 128, train_files=[file], test_files=str(file), tokenizer="gpt2", seed=0)  # type: ignore[list-item]
    assert data.settings == {
        "source": "files",
        "sequence_length": 128,
        "train_files": [str(file)],
        "test_files": str(file),
        "tokenizer": "gpt2",
    }
    assert TextDataModule().settings == {}


def test_a_tokenizer_that_is_an_object_is_no_setting(tokenizer: PreTrainedTokenizerFast) -> None:
    assert TextDataModule(tokenizer=tokenizer).settings == {}


@pytest.mark.parametrize("alone", [False, True], ids=["datamodule", "its loaders"])
@pytest.mark.parametrize("options", [{"limit_train_batches": 7}, {"limit_train_batches": 0.7}, {"overfit_batches": 3}])
def test_epochs_of_a_limited_trainer(
    tokenizer: PreTrainedTokenizerFast, text_file: str, options: dict[str, Any], alone: bool
) -> None:
    """Each has as many batches as the Trainer was asked for, and ends as an epoch does."""
    data = TextDataModule(
        "files", sequence_length=8, batch_size=1, tokenizer=tokenizer, train_files=[text_file], test_files=[text_file]
    )

    class Counting(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batches, self.epochs, self.validations = 0, [], 0
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.batches += 1
            return self.weight.square()

        def on_train_epoch_end(self) -> None:
            self.epochs.append(self.batches)

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None: ...

        def on_validation_end(self) -> None:
            self.validations += 1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, length = Counting(), 12  # windows of 8 words in 103
    loaders = (data.train_dataloader(), data.val_dataloader()) if alone else (data,)
    Trainer(
        accelerator="cpu",
        max_epochs=3,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, *loaders)
    (limit,) = options.values()
    each = int(length * limit) if isinstance(limit, float) else limit
    assert module.epochs == [each, 2 * each, 3 * each]
    assert module.validations == 3


def test_windows_of_padding_are_passed_over() -> None:
    ids = torch.arange(24).view(6, 4)
    mask = torch.ones_like(ids)
    mask[0] = mask[3] = 0
    mask[1, 2:] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(2), mask.split(2), strict=True)]
    taken, total = take_windows(batches, 3, Ranks(), torch.device("cpu"))
    assert total == 3
    assert torch.cat([batch.inputs["input_ids"] for batch in taken]).tolist() == ids[[1, 2, 4]].tolist()
    with pytest.raises(UserError, match="at least one calibration window"):
        take_windows([{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}], 3, Ranks(), torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_turns_among_windows_that_count(rank: int) -> None:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, 2
    ids = torch.arange(10).view(5, 2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with mock.patch.object(ranks, "total", return_value=[4]):
        taken, _ = take_windows([{"input_ids": ids, "attention_mask": mask}], 4, ranks, torch.device("cpu"))
    assert taken[0].inputs["input_ids"].tolist() == ids[[[0, 3], [2, 4]][rank]].tolist()


class OwnLoss(CausalLM):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)


def test_only_causal_lm_gets_windows_without_labels(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    """The mean loss of a batch without labels is NaN in a module that takes transformers' own."""
    data = _module(tokenizer, source="files", train_files=text_file, test_files=text_file, max_eval_windows=5)
    for module, windows in ((CausalLM("not loaded"), 6), (LightningModule(), 5), (OwnLoss("not loaded"), 5)):
        data.trainer = SimpleNamespace(world_size=3, lightning_module=module)  # type: ignore[assignment]
        rows = [row for batch in data.test_dataloader() for row in batch["labels"]]
        assert len(rows) == windows
        assert sum(bool((row != -100).all()) for row in rows) == 5


def test_ranks_share_the_training_windows(tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    def windows(world: int, rank: int) -> list[list[int]]:
        data = _module(tokenizer, source="files", train_files=text_file)
        trainer = SimpleNamespace(world_size=world, global_rank=rank, limit_train_batches=1.0, training=False)
        data.trainer = trainer  # type: ignore[assignment]
        found: list[list[int]] = _rows(data.train_dataloader()).tolist()
        return found

    first, second = windows(2, 0), windows(2, 1)
    assert len(first) == len(second)
    assert sorted(first + second) == sorted(windows(1, 0))


def test_numbers_of_numpy_reach_the_report() -> None:
    data = TextDataModule(sequence_length=np.int64(64), max_eval_windows=np.int64(4))  # type: ignore[arg-type]
    assert json.dumps(data.settings) == '{"sequence_length": 64, "max_eval_windows": 4}'
