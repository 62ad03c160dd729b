"""Finished blocks on disk, so that a run that is killed goes on at the first unfinished one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsellm_lightning.architectures import Block, DecoderLayout
from sparsellm_lightning.calibration import CalibrationBatch
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.masks import local_tensor
from sparsellm_lightning.ranks import Ranks
from sparsellm_lightning.results import BlockResult
from sparsellm_lightning.strategies import StrategyAdapter

_FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True)
class Entry:
    """A finished block.

    Args:
        tensors: by projection name, this rank's rows as (rows, in features), in the parameter's dtype; of a block that was
            reconstructed, by parameter name, this rank's part of every parameter.
        result: what was reported of it.
    """

    tensors: dict[str, Tensor]
    result: BlockResult


class Journal:
    """One folder per run: a file per finished block and rank, windows that the model wrote, the fingerprint of the run.

    Files are written beside their place and renamed into it, and carry the SHA-256 of their content in their name: what a
    kill leaves is either a whole file or none. A damaged file counts as none, with a warning.

    Args:
        folder: created if it does not exist.
        fingerprint: of the run, see :func:`fingerprint`. The same on every rank.
        adapter: of the strategy the model runs under.

    Raises:
        UserError: the folder holds the journal of a run with another fingerprint; names the keys that differ.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any], adapter: StrategyAdapter) -> None:
        self.folder, self.adapter = Path(folder), adapter
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _FINGERPRINT
        if path.exists():
            _compare(json.loads(path.read_text()), fingerprint, self.folder)
        elif adapter.ranks.rank == 0:
            _replace(path, (json.dumps(fingerprint, indent=2) + "\n").encode())
        # Nobody writes before everybody has compared.
        adapter.ranks.gather(torch.zeros(1))

    def read(self, block: Block) -> Entry | None:
        """A finished block; None unless every rank finds its part whole."""
        found = self._read(_of_block(block))
        return None if found is None else Entry(found[0], BlockResult(**found[1]))

    def write(self, block: Block, result: BlockResult) -> None:
        """Note a block as it now is in the model."""
        if result.reconstruction is None:
            tensors = {p.name: self.adapter.read_rows(p).to(p.parameter.dtype) for p in block.projections()}
        else:
            tensors = {name: local_tensor(parameter) for name, parameter in block.module.named_parameters()}
        self._write(_of_block(block), tensors, asdict(result))

    def remember(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """This rank's tensor of that name: as noted, else made, by all ranks together, and noted.

        For what another machine would not make to the bit, such as sampled text.
        """
        found = self._read(name)
        if found is not None:
            return found[0][name]
        made = make()
        self._write(name, {name: made}, {})
        return made

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and what was noted beside them; None unless every rank finds its file whole."""
        found = self._read_mine(name)
        whole = torch.tensor([found is not None], dtype=torch.int64)
        self.adapter.ranks.sum_(whole)
        return found if int(whole) == self.adapter.ranks.size else None

    def _read_mine(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        for path in self.folder.glob(f"{self._stem(name)}.*.safetensors"):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.suffixes[-2].removeprefix("."):
                warnings.warn(f"Journal: {path} is damaged; {name} is done again.", stacklevel=2)
                return None
            try:
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                return load(content), json.loads(header["__metadata__"]["result"])
            except (SafetensorError, KeyError, ValueError, TypeError) as error:
                warnings.warn(f"Journal: {path} cannot be read ({error}); {name} is done again.", stacklevel=2)
        return None

    def _write(self, name: str, tensors: dict[str, Tensor], result: dict[str, Any]) -> None:
        noted = {"result": json.dumps(result)}
        content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, noted)
        for old in self.folder.glob(f"{self._stem(name)}.*"):
            old.unlink()
        _replace(self.folder / f"{self._stem(name)}.{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def _stem(self, name: str) -> str:
        return f"{name}-rank-{self.adapter.ranks.rank}"


def _of_block(block: Block) -> str:
    return f"block-{block.index:05d}"


def fingerprint(
    layout: DecoderLayout, batches: Iterable[CalibrationBatch], config: PruningConfig, ranks: Ranks
) -> dict[str, Any]:
    """What decides a run's result: settings, model, calibration windows, number of ranks, versions.

    The model's weights and the windows enter by a hash over all ranks.
    """
    from sparsellm_lightning.report import versions

    weights = hashlib.sha256()
    for name, parameter in layout.model.named_parameters():
        local = local_tensor(parameter)
        # A checksum in float64, and the bytes of some entries: reading 140 GB for a hash would take minutes.
        some = local.flatten()[:: max(1, local.numel() // 1024)].float().cpu()
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(local.sum(dtype=torch.float64).cpu().numpy().tobytes())
        weights.update(some.numpy().tobytes())
    windows = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            windows.update(f"{name} {tuple(tensor.shape)}".encode())
            windows.update(tensor.cpu().float().numpy().tobytes())
    settings = json.loads(json.dumps(asdict(config)))
    del settings["memory"]  # changes the speed, not the result
    return {
        "config": settings,
        "model": {"type": layout.model.config.model_type, "weights": _over_ranks(weights, ranks)},
        "windows": _over_ranks(windows, ranks),
        "ranks": ranks.size,
        "versions": versions(),
    }


def _over_ranks(digest: Any, ranks: Ranks) -> str:
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    return hashlib.sha256(b"".join(bytes(part.tolist()) for part in ranks.gather(mine))).hexdigest()


def _compare(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    differing = [
        f"{key}: {_at(stored, key)} there, {_at(wanted, key)} here"
        for key in sorted({*_keys(stored), *_keys(wanted)})
        if _at(stored, key) != _at(wanted, key)
    ]
    if differing:
        raise UserError(
            f"journal_dir {folder} holds the journal of another run; these differ: {'; '.join(differing)}. Choose another "
            "folder, delete this one, or put the settings back."
        )


def _keys(nested: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in nested.items():
        yield from _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def _at(nested: Any, key: str) -> Any:
    for part in key.split("."):
        nested = nested.get(part) if isinstance(nested, dict) else None
    return nested


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
