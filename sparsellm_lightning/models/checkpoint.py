"""Reading Lightning checkpoints without executing code from them."""

from __future__ import annotations

import io
import pickle  # nosec B403
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import PreTrainedModel

from sparsellm_lightning.errors import UserError

_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("builtins", name) for name in ("dict", "frozenset", "list", "set", "slice", "tuple")),
}
# A damaged pickle raises almost any of these.
_UNREADABLE = (
    *(KeyError, IndexError, AttributeError, TypeError, ValueError, ImportError, EOFError),
    *(RuntimeError, OSError, AssertionError, pickle.UnpicklingError, CheckpointException),
)


def is_checkpoint(path: str) -> bool:
    """Whether this is a Lightning checkpoint: a ``.ckpt`` file, or the folder of a sharded one."""
    return path.endswith(".ckpt") or (Path(path).expanduser() / ".metadata").is_file()


def check_checkpoint(path: str) -> None:
    """Refuse what Lightning could not resume from, or what would execute code when it is read.

    Args:
        path: of a local file, or of the folder of a sharded checkpoint.

    Raises:
        UserError: it is damaged, or no checkpoint.
    """
    at = Path(path).expanduser()
    if at.is_dir() and not (at / ".metadata").is_file():
        raise UserError(
            f"ckpt_path must be a checkpoint, but the folder {path} has no .metadata. An exported folder is model.weights."
        )
    try:
        if at.is_dir():
            _SafeReader(at).read_metadata()
            torch.load(at / "meta.pt", "cpu", weights_only=True, mmap=True)  # written last
        elif "pytorch-lightning_version" not in torch.load(at, "cpu", weights_only=True, mmap=True):
            raise ValueError("it was not written by Lightning")
    except _UNREADABLE as error:
        raise UserError(
            f"ckpt_path must be a checkpoint of Lightning, got {path}: {_cause(error)}. Correct the path, or leave it out."
        ) from error


def load_checkpoint(model: PreTrainedModel, path: str, prefix: str) -> None:
    """Load the weights of a Lightning checkpoint into a model. Optimizer and progress are not read.

    Args:
        model: of the same architecture.
        path: a file (``save_weights_only`` or not), or the folder of a sharded checkpoint.
        prefix: of the model's weights in the LightningModule.

    Raises:
        UserError: there is no such checkpoint, it belongs to another model, or reading it would execute code.
    """
    at = Path(path).expanduser()
    if not at.exists():
        raise UserError(f"weights looks like a checkpoint, but {path} does not exist. Correct the path.")
    try:
        state = _read_sharded(at) if at.is_dir() else torch.load(at, "cpu", weights_only=True, mmap=True)
        model.load_state_dict(
            {name.removeprefix(prefix): t for name, t in state["state_dict"].items() if name.startswith(prefix)}
        )
    except _UNREADABLE as error:
        raise UserError(
            f"weights must be a checkpoint of the model that pretrained names, got {path}: {_cause(error)}. Check both; a "
            "checkpoint with LoRA adapters has to be exported first."
        ) from error


def _cause(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, CheckpointException):  # its text is a traceback
        text = text.strip().splitlines()[-1]
    return " ".join(text.split())[:300]


def _read_sharded(folder: Path) -> dict[str, Any]:
    """The state of a sharded checkpoint, whole and on the CPU."""
    reader = _SafeReader(folder)
    reader.read_metadata()  # a refusal here keeps its message
    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=reader, planner=_SafePlanner(keys={"state_dict", "model"}), no_dist=True)
    return state if "state_dict" in state else {"state_dict": state["model"]}  # FSDP1's name for them


class _SafeReader(FileSystemReader):
    """Reads ``.metadata``, which is a pickle, with an unpickler that knows only the classes of such files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"its .metadata names the file {stored.relative_path}, outside the folder")
        return metadata


class _SafePlanner(_EmptyStateDictLoadPlanner):
    """Loads entries that are not tensors with torch's restricted unpickler."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _METADATA_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type):
                return found
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which may execute code")
