"""Model files without the zeros.

The format: ``packed*.safetensors`` takes the place of ``model*.safetensors``. A tensor NAME of n entries is stored as the two
tensors below, if both together take less memory,

- ``NAME.bits``: (⌈n / 8⌉,) uint8. Bit i mod 8, from the lowest, of byte ⌊i / 8⌋ is 1 if entry i, row by row, is not zero.
- ``NAME.kept``: the entries that are not zero, in that order, in the tensor's dtype,

and its shape is in the file's metadata, ``"shapes"``, a JSON object by NAME. Every other tensor is stored as it is. The bits of
an N:M pattern are M for each group of M weights: 2:4 and 4:8 take two bits for each kept weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsellm_lightning.sparsity import pack, unpack

_PLAIN, _PACKED = "model", "packed"


def pack_tensor(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bits and kept entries of a tensor, of any floating-point dtype. None if they would take no less memory."""
    flat = tensor.detach().cpu().reshape(-1)
    mask = flat != 0
    size = math.ceil(len(flat) / 8) + int(mask.sum()) * flat.element_size()
    if size >= len(flat) * flat.element_size():
        return None
    return pack(mask), flat[mask]


def unpack_tensor(bits: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of :func:`pack_tensor`.

    Raises:
        ValueError: bits, entries and shape do not belong together.
    """
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or len(bits) != math.ceil(size / 8):
        raise ValueError(f"{size} entries need {math.ceil(size / 8)} bytes of bits, got {len(bits)} of {bits.dtype}")
    mask = unpack(bits, torch.Size([size]))
    if int(mask.sum()) != len(kept):
        raise ValueError(f"the bits keep {int(mask.sum())} entries, but there are {len(kept)}")
    return kept.new_zeros(size).masked_scatter_(mask, kept).view(shape)


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds a packed model."""
    return Path(folder).is_dir() and any(Path(folder).glob(f"{_PACKED}*.safetensors"))


def pack_folder(folder: Path) -> dict[str, int]:
    """Replace the safetensors files that ``save_pretrained`` wrote by packed ones.

    Returns:
        bytes of the ``plain`` files, and of the ``packed`` ones.
    """
    sizes = {"plain": 0, "packed": 0}
    for plain in sorted(folder.glob(f"{_PLAIN}*.safetensors")):
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, list[int]] = {}
        with safe_open(plain, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                tensor = file.get_tensor(name)
                found = pack_tensor(tensor) if tensor.is_floating_point() else None
                if found is None:
                    tensors[name] = tensor
                else:
                    tensors[f"{name}.bits"], tensors[f"{name}.kept"] = found
                    shapes[name] = list(tensor.shape)
        packed = plain.with_name(_PACKED + plain.name.removeprefix(_PLAIN))
        save_file(tensors, packed, {"format": "pt", "shapes": json.dumps(shapes)})
        sizes["plain"] += plain.stat().st_size
        sizes["packed"] += packed.stat().st_size
        plain.unlink()
    (folder / f"{_PLAIN}.safetensors.index.json").unlink(missing_ok=True)
    return sizes


def read_packed(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a packed model, by name.

    Raises:
        ValueError: a file does not hold what its metadata says.
    """
    state: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob(f"{_PACKED}*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            shapes: dict[str, list[int]] = json.loads(metadata.get("shapes", "{}"))
            parts = {f"{name}.{part}" for name in shapes for part in ("bits", "kept")}
            missing = parts - {*file.keys()}
            if missing:
                raise ValueError(f"{path.name}: lacks {min(missing)}")
            for name, shape in shapes.items():
                try:
                    state[name] = unpack_tensor(
                        file.get_tensor(f"{name}.bits"), file.get_tensor(f"{name}.kept"), tuple(shape)
                    )
                except ValueError as error:
                    raise ValueError(f"{path.name}: {name}: {error}") from None
            for name in {*file.keys()} - parts:
                state[name] = file.get_tensor(name)
    return state
