"""Speed and size of models, measured in turn so that the machine's other work meets all alike."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import context_of, vocabulary_of
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models.loading import load_model
from sparsellm_lightning.runtime import best_device

_PROMPT = 8  # tokens in front of those that are generated one by one


@dataclass
class Speed:
    """Measurements of one model.

    Args:
        name: that it was given by.
        parameters: number of them, zeros included.
        zeros: number of parameters that are 0.
        memory_bytes: of parameters and buffers.
        file_bytes: of the safetensors and GGUF files in its folder. None for a model that is not a folder.
        load: seconds of loading, one for each repetition.
        prefill: tokens a second of a forward over the prompt, likewise.
        decode: tokens a second of greedy generation with a cache, likewise.
        kernels: ``2:4`` if sparse tensor cores are used, otherwise ``dense``.
    """

    name: str
    parameters: int
    zeros: int
    memory_bytes: int
    file_bytes: int | None
    load: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    kernels: str = "dense"

    def median(self, figure: str) -> float:
        """Median over repetitions of ``load``, ``prefill`` or ``decode``."""
        return float(statistics.median(getattr(self, figure)))

    def times(self, other: Speed, figure: str) -> float:
        """Median over repetitions of this model's figure, divided by the other's in the same repetition."""
        pairs = zip(getattr(self, figure), getattr(other, figure), strict=True)
        return float(statistics.median(a / b for a, b in pairs))


@torch.no_grad()
def measure_speed(
    names: Sequence[str], prompt_tokens: int = 512, new_tokens: int = 64, repeats: int = 5
) -> list[Speed]:
    """Measure models, one after the other within every repetition.

    On a CUDA GPU a model with 2:4 zeros and 16-bit weights is measured once more with torch's semi-structured tensors, which
    use sparse tensor cores.

    Args:
        names: as for :func:`~sparsellm_lightning.load_model`.
        prompt_tokens: length of the prompt of the prefill.
        new_tokens: number of tokens generated.
        repeats: repetitions. One more comes before them and is not counted.

    Raises:
        UserError: no such model, or more tokens than its context holds.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}. Leave it out for the default.")
    device = best_device()
    found, models = [], []
    for name in names:
        model = load_model(name).eval().to(device)
        if max(prompt_tokens, _PROMPT + new_tokens) > context_of(model):
            raise UserError(
                f"The context of {name} holds {context_of(model)} tokens, got prompt_tokens {prompt_tokens} and new_tokens "
                f"{new_tokens}. Lower them."
            )
        found.append(
            Speed(
                name,
                sum(p.numel() for p in model.parameters()),
                sum(int((p == 0).sum()) for p in model.parameters()),
                _memory_bytes(model),
                _file_bytes(Path(name)),
            )
        )
        models.append(model)
        has_kernels = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        if has_kernels and any(True for _ in _semi_structured(model)):
            models.append(copy.deepcopy(model))
            use_semi_structured(models[-1])
            memory = _memory_bytes(models[-1])
            found.append(replace(found[-1], kernels="2:4", memory_bytes=memory, load=[], prefill=[], decode=[]))
    for repetition in range(repeats + 1):
        for speed, model in zip(found, models, strict=True):
            load = _seconds(partial(load_model, speed.name), device)
            prefill = prompt_tokens / _seconds(partial(_prefill, model, prompt_tokens), device)
            decode = new_tokens / _seconds(partial(_decode, model, new_tokens), device)
            if repetition:
                speed.load.append(load)
                speed.prefill.append(prefill)
                speed.decode.append(decode)
    return found


def _memory_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers. A semi-structured tensor has the dense shape, but holds smaller tensors, which count."""

    def size(tensor: Tensor) -> int:
        inside: list[str] = tensor.__tensor_flatten__()[0] if isinstance(tensor, SparseSemiStructuredTensor) else []
        return sum(size(getattr(tensor, name)) for name in inside) or tensor.numel() * tensor.element_size()

    return sum(map(size, (*model.parameters(), *model.buffers())))


def use_semi_structured(model: PreTrainedModel) -> int:
    """Replace 16-bit weights of linear layers that have 2:4 zeros by torch's semi-structured tensors. Returns their number."""
    modules = list(_semi_structured(model))
    for module in modules:
        weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(weight, requires_grad=False)
    return len(modules)


def _semi_structured(model: PreTrainedModel) -> Iterator[nn.Linear]:
    """The linear layers with 2:4 zeros whose dtype and shape torch's kernels take."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype in (torch.float16, torch.bfloat16):
            rows, columns = module.weight.shape
            if rows % 32 == columns % 64 == 0 and _is_two_of_four(module.weight.detach()):
                yield module


def _is_two_of_four(weight: Tensor) -> bool:
    return bool(((weight == 0).view(-1, 4).sum(1) >= 2).all())


def _prefill(model: PreTrainedModel, tokens: int) -> None:
    model(input_ids=_ids(model, tokens), use_cache=True)


def _decode(model: PreTrainedModel, tokens: int) -> None:
    ids, generate = _ids(model, _PROMPT), cast(Any, model).generate
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def _ids(model: PreTrainedModel, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_of(model), (1, tokens), generator=generator).to(model.device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _file_bytes(folder: Path) -> int | None:
    folder = folder.expanduser()
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))
