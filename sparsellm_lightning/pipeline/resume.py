"""The journal: finished blocks on disk, so that a run that is killed goes on at the first unfinished one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsellm_lightning.architecture import Block
from sparsellm_lightning.calibration import Context
from sparsellm_lightning.data import CalibrationBatch
from sparsellm_lightning.distributed import local_tensor
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.reporting import BlockResult, versions
from sparsellm_lightning.solvers import Ranks

_FINGERPRINT = "fingerprint.json"


class Journal:
    """A folder with one file for each finished block and rank, the windows that the model wrote, and the run's fingerprint.

    A file is written beside its place and renamed, and its name holds the SHA-256 of its content. So a kill leaves a whole
    file or none. A damaged file counts as missing, with a warning.

    Args:
        folder: created if it does not exist.
        context: of the run.
        batches: this rank's calibration windows, before any are written by the model.

    Raises:
        UserError: the folder holds the journal of a run with another fingerprint. Names the keys that differ.
    """

    def __init__(self, folder: str | Path, context: Context, batches: Iterable[CalibrationBatch]) -> None:
        self.folder, self.ranks = Path(folder), context.ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = fingerprint(context, batches)
        path = self.folder / _FINGERPRINT
        if path.exists():
            _compare(json.loads(path.read_text()), wanted, self.folder)
        elif self.ranks.rank == 0:
            _replace(path, (json.dumps(wanted, indent=2) + "\n").encode())
        self.ranks.all(True)  # no rank writes before all have compared

    def restore(self, block: Block) -> BlockResult | None:
        """Put a finished block's parameters into the model. None if any rank lacks its file."""
        found = self._read(_name(block))
        if found is None:
            return None
        tensors, result = found
        for name, parameter in block.module.named_parameters():
            local_tensor(parameter).copy_(tensors[name])
        return BlockResult(**result)

    def write(self, block: Block, result: BlockResult) -> None:
        """Note a block's parameters as they are in the model: this rank's part of each."""
        tensors = {name: local_tensor(parameter) for name, parameter in block.module.named_parameters()}
        self._write(_name(block), tensors, asdict(result))

    def remember(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """This rank's tensor of that name: from the journal, or made by all ranks together and then noted.

        For tensors that another machine would not make bit-equal, such as sampled text.
        """
        found = self._read(name)
        if found is not None:
            return found[0][name]
        made = make()
        self._write(name, {name: made}, {})
        return made

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors, and the result noted with them. None unless every rank finds its file whole."""
        found = self._read_mine(name)
        return found if self.ranks.all(found is not None) else None

    def _read_mine(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        for path in self.folder.glob(f"{self._stem(name)}.*.safetensors"):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.suffixes[-2].removeprefix("."):
                warnings.warn(f"Journal: {path} is damaged. {name} is done again.", stacklevel=2)
                return None
            try:
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                return load(content), json.loads(header["__metadata__"]["result"])
            except (SafetensorError, KeyError, ValueError, TypeError) as error:
                warnings.warn(f"Journal: {path} cannot be read ({error}). {name} is done again.", stacklevel=2)
        return None

    def _write(self, name: str, tensors: dict[str, Tensor], result: dict[str, Any]) -> None:
        noted = {"result": json.dumps(result)}
        content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, noted)
        for old in self.folder.glob(f"{self._stem(name)}.*"):
            old.unlink()
        _replace(self.folder / f"{self._stem(name)}.{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def _stem(self, name: str) -> str:
        return f"{name}-rank-{self.ranks.rank}"


def fingerprint(context: Context, batches: Iterable[CalibrationBatch]) -> dict[str, Any]:
    """What decides a run's result: settings, model, calibration windows, arithmetic, number of ranks, versions.

    The model's weights and the windows enter by a hash over all ranks.
    """
    weights = hashlib.sha256()
    for name, parameter in context.layout.model.named_parameters():
        local = local_tensor(parameter)
        # A sum in float64, and the bytes of some entries, because hashing 140 GB would take minutes.
        some = local.flatten()[:: max(1, local.numel() // 1024)].float().cpu()
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(local.sum(dtype=torch.float64).cpu().numpy().tobytes())
        weights.update(some.numpy().tobytes())
    windows = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            windows.update(f"{name} {tuple(tensor.shape)}".encode())
            windows.update(tensor.cpu().float().numpy().tobytes())
    settings = json.loads(json.dumps(asdict(context.config)))
    del settings["memory"]  # changes the speed, not the result
    return {
        "config": {**settings, "keep_zeros": context.keep_zeros},
        "model": {"type": context.layout.model.config.model_type, "weights": _over_ranks(weights, context.ranks)},
        "windows": _over_ranks(windows, context.ranks),
        "ranks": context.ranks.size,
        "arithmetic": {
            "coarse_dtype": str(context.coarse_dtype),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "versions": versions(),
    }


def _name(block: Block) -> str:
    return f"block-{block.index:05d}"


def _over_ranks(digest: Any, ranks: Ranks) -> str:
    return hashlib.sha256(b"".join(bytes(part) for part in ranks.gather_counts(*digest.digest()))).hexdigest()


def _compare(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    differing = [
        f"{key}: {_at(stored, key)} there, {_at(wanted, key)} here"
        for key in sorted({*_keys(stored), *_keys(wanted)})
        if _at(stored, key) != _at(wanted, key)
    ]
    if differing:
        raise UserError(
            f"resume_dir {folder} holds the journal of another run. These differ: {'; '.join(differing)}. Choose another "
            "folder, delete this one, or restore the settings."
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
