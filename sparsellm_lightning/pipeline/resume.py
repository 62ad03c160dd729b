"""The journal: finished blocks on disk, so that a run that is killed goes on at the first unfinished one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
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
_WEIGHTS = "model.weights"  # key of the fingerprint
_HASHES = {"windows": "the calibration windows (text, tokenizer or seed)", _WEIGHTS: "the model's weights"}


class Journal:
    """A folder with one file for each finished block and rank, the windows that the model wrote, and the run's fingerprint.

    A file is written beside its place and renamed, and its name holds the SHA-256 of its content. So a kill leaves a whole
    file or none. A damaged file counts as missing, with a warning. If the file of the allocation, of the parts to remove or of
    the written windows is missing, all blocks count as missing too, because they were solved with its content.

    A later stage of gradual pruning starts from weights that were trained, and training may not repeat bit by bit. So the
    journal of a later stage with other weights is begun anew, with a warning.

    Args:
        folder: created if it does not exist.
        context: of the run.
        batches: this rank's calibration windows, before any are written by the model.

    Raises:
        UserError: the folder holds the journal of a run with another fingerprint (names the keys that differ), or cannot be
            written.
    """

    def __init__(self, folder: str | Path, context: Context, batches: Iterable[CalibrationBatch]) -> None:
        self.folder, self.adapter, self.ranks = Path(folder), context.adapter, context.ranks
        self.restored_seconds = 0.0  # that earlier runs took for the blocks restored so far
        # A folder that cannot be written is refused here.
        self._write_file(f"trial-rank-{self.ranks.rank}", b"").unlink()
        wanted = fingerprint(context, batches)
        stored = self._read_fingerprint()
        differing = [] if stored is None else _differing(stored, wanted)
        others = [text for key, text in differing if not (context.keep_zeros and key == _WEIGHTS)]
        if others:
            raise UserError(
                f"resume_dir {folder} holds the journal of another run. These differ: {'; '.join(others)}. Choose another "
                "folder, delete this one, or restore the settings."
            )
        if not self.ranks.all(not differing):
            warnings.warn(f"resume_dir {folder} was written for other trained weights. It is begun anew.", stacklevel=2)
            self._forget("*")
        if self.ranks.rank == 0 and (stored is None or differing):
            self._write_file(_FINGERPRINT, (json.dumps(wanted, indent=2) + "\n").encode())
        self.ranks.all(True)  # no rank goes on before the first has written

    def _read_fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint in the folder. None if there is none."""
        path = self.folder / _FINGERPRINT
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"resume_dir {self.folder} must hold a readable {_FINGERPRINT}, but reading it fails ({error}). Choose another "
                "folder, or delete this one to begin anew."
            ) from error
        return stored if isinstance(stored, dict) else {}

    def restore(self, block: Block) -> BlockResult | None:
        """Put a finished block's parameters into the model. None if any rank lacks its file."""
        found = self._read(_name(block))
        if found is None:
            return None
        tensors, noted = found
        with self.adapter.holding(block.module):
            pass  # a unit that a forward has left gathered is sharded again
        for name, parameter in block.module.named_parameters():
            local_tensor(parameter).copy_(tensors[name])
        result = BlockResult(**noted)
        self.restored_seconds += result.seconds
        return result

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
        self._forget("block-*")  # solved with another tensor
        self._write(name, {name: made}, {})
        return made

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors, and the result noted with them. None unless every rank finds its file whole.

        Otherwise every rank deletes its file, and all make new ones: files of two runs may not fit together.
        """
        found = self._read_mine(name)
        if self.ranks.all(found is not None):
            return found
        self._forget(name)
        return None

    def _forget(self, name: str) -> None:
        """Delete this rank's files of that name, which may be a pattern."""
        for path in self.folder.glob(f"{self._stem(name)}.*"):
            path.unlink()

    def _read_mine(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        for path in self.folder.glob(f"{self._stem(name)}.*.safetensors"):
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != path.suffixes[-2].removeprefix("."):
                    warnings.warn(f"{path} in resume_dir is damaged. {name} is done again.", stacklevel=2)
                    return None
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                return load(content), json.loads(header["__metadata__"]["result"])
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
                warnings.warn(f"{path} in resume_dir cannot be read ({error}). {name} is done again.", stacklevel=2)
        return None

    def _write(self, name: str, tensors: dict[str, Tensor], result: dict[str, Any]) -> None:
        noted = {"result": json.dumps(result)}
        content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, noted)
        digest = hashlib.sha256(content).hexdigest()
        self._write_file(f"{self._stem(name)}.{digest}.safetensors", content)

    def _write_file(self, name: str, content: bytes) -> Path:
        """Write a file beside its place, and rename it.

        Raises:
            UserError: the system refuses it.
        """
        path, partial = self.folder / name, self.folder / f".{name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise UserError(
                f"resume_dir must be writable, but {name} cannot be written to {self.folder}: {error.strerror or error}. Free "
                "space or choose another folder. The finished blocks in it stay usable: start the same command again to go on."
            ) from error

    def _stem(self, name: str) -> str:
        return f"{name}-rank-{self.ranks.rank}"


def fingerprint(context: Context, batches: Iterable[CalibrationBatch]) -> dict[str, Any]:
    """What decides a run's result: settings, model, calibration windows, arithmetic, number of ranks, versions.

    Every byte of the model's weights and of the windows enters a hash, over all ranks.
    """
    model, strategy = context.layout.model, context.adapter.strategy
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(local_tensor(parameter).flatten().view(torch.uint8).cpu().numpy().data)
    windows = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            windows.update(f"{name} {tuple(tensor.shape)}".encode())
            windows.update(tensor.cpu().float().numpy().tobytes())
    settings = asdict(context.config)
    del settings["memory"]  # a run that had no room can go on with less
    # Likewise without distillation. It follows the blocks, which depend only on whether anything is tuned.
    settings["distillation_steps"] = context.config.tunes
    model_config = {
        k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")
    }
    found = {
        "config": {**settings, "keep_zeros": context.keep_zeros},
        "model": {"config": model_config, "weights": _over_ranks(weights, context.ranks)},
        "windows": _over_ranks(windows, context.ranks),
        "ranks": context.ranks.size,
        "arithmetic": {
            "coarse_dtype": str(context.coarse_dtype),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "precision": None if strategy is None else strategy.precision_plugin.precision,
            "attention": model.config._attn_implementation,
        },
        "versions": versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _name(block: Block) -> str:
    return f"block-{block.index:05d}"


def _over_ranks(digest: Any, ranks: Ranks) -> str:
    return hashlib.sha256(b"".join(bytes(part) for part in ranks.gather_counts(*digest.digest()))).hexdigest()


def _differing(stored: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys whose values differ, each with a text that says what differs."""
    one, other = _flat(stored), _flat(wanted)
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return [(key, _HASHES.get(key) or f"{key}: {one.get(key)} there, {other.get(key)} here") for key in keys]


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values inside, by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
