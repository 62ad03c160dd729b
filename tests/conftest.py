"""Session fixtures: a tokenizer, tiny models trained on the Python documentation, and processes for the distributed tests.

The workers of pytest-xdist share the trained models: the first worker that needs a model trains it and saves it. One worker
runs all distributed tests.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is loaded. Threads slow tiny tensors down, by a factor of ten where other processes use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests with two threads would wait in a loop for a core that another worker uses: two to three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from support.models import SEQUENCE, load_or_train, train_tokenizer
from support.pool import RankPool
from support.quick import constant_speed, without_drawing
from support.text import tokenised_once
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsellm_lightning.data import TextDataModule


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests one by one, except that one worker gets all distributed tests, because it keeps their processes.

    The mark ``xdist_group`` would say the same, but xdist 3.8 ignores it under pytest 9.2: it writes an attribute of the
    test items that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "distributed" if "tests/distributed/" in nodeid else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _tokenised_once() -> Iterator[None]:
    with tokenised_once():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


@pytest.fixture(scope="session")
def text(tokenizer: PreTrainedTokenizerFast) -> TextDataModule:
    return TextDataModule(
        "python-docs", sequence_length=SEQUENCE, batch_size=16, max_eval_windows=64, tokenizer=tokenizer
    )


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of trained models, which all workers of the session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def _trained(models_dir: Path, text: TextDataModule) -> Callable[[str], PreTrainedModel]:
    loaded: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in loaded:
            loaded[name] = load_or_train(models_dir, name, text)
        return loaded[name]

    return get


@pytest.fixture
def trained(_trained: Callable[[str], PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """``trained(name)``: a copy of the tiny model of that name, trained once in the session."""
    return lambda name: copy.deepcopy(_trained(name))


@pytest.fixture(scope="session")
def folder_of(models_dir: Path, _trained: Callable[[str], PreTrainedModel]) -> Callable[[str], str]:
    """``folder_of(name)``: the trained tiny model of that name as a Hugging Face folder. Tests must not write to it."""

    def get(name: str) -> str:
        _trained(name)
        return str(models_dir / name)

    return get


@pytest.fixture(scope="session")
def model_dir(folder_of: Callable[[str], str]) -> Path:
    """The trained tiny LLaMA as a Hugging Face folder. Tests must not write to it."""
    return Path(folder_of("llama"))


@pytest.fixture
def calibration(text: TextDataModule) -> list[dict[str, torch.Tensor]]:
    return list(text.calibration_dataloader(num_samples=64, seed=0))


@pytest.fixture
def ids(calibration: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The calibration windows in one tensor."""
    return torch.cat([batch["input_ids"] for batch in calibration])


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(n)``: n processes that run the jobs of ``support.jobs``. They are started on first use and kept."""
    pools: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size))

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """Speeds of products are a constant, and plots are drawn only in tests with the marker ``draws``."""
    with constant_speed(), nullcontext() if "draws" in request.keywords else without_drawing():
        yield
