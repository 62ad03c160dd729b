"""Short forwards of a model, and of each of its decoder blocks, that show what is inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparsellm_lightning.architecture.blocks import (
    decoder_blocks,
    device_of,
    evaluating,
    hidden_states,
    patched_forward,
    refusing,
    unwrapped_names,
    vocabulary_of,
    without_cache,
)
from sparsellm_lightning.architecture.examination import Examination
from sparsellm_lightning.architecture.feed_forward import activations_of
from sparsellm_lightning.architecture.layout import Block
from sparsellm_lightning.architecture.observation import (
    TOKENS,
    WINDOWS,
    BlockCall,
    Observation,
    hidden_of,
    order_of,
)
from sparsellm_lightning.errors import UserError

RunModel = Callable[[PreTrainedModel, dict[str, Tensor]], object]
"""Calls a model with ``input_ids`` so that its decoder blocks run."""


def run_base(model: PreTrainedModel, inputs: dict[str, Tensor]) -> object:
    """A forward without the head."""
    return model.base_model(**inputs, **without_cache(model.base_model))


@torch.no_grad()
def probe_blocks(model: PreTrainedModel, run: RunModel = run_base) -> list[Block]:
    """Find the structure of every decoder block.

    Args:
        model: with weights.
        run: see :data:`RunModel`.

    Raises:
        UserError: blocks that are not called once each, in order, with hidden states of (batch, sequence, ...); a block that
            gives another output when it is called again; a row of the table that does not describe the blocks.
    """
    modules = decoder_blocks(model)
    names = unwrapped_names(model)
    _check_distinct(model, modules)
    with evaluating(model), ExitStack() as stack:
        for module in modules:
            stack.enter_context(_filled(module))
        calls = _block_calls(model, modules, names, run)
        activations = activations_of(model.config.get_text_config(decoder=True))
        blocks = []
        for index, module in enumerate(modules):
            seen = Observation(model, module, names, calls[index], activations)
            seen.observe()
            blocks.append(Examination(index, seen).block())
        _warn_of_other_links(model, blocks, calls, run)
        return blocks


@contextmanager
def _filled(block: nn.Module) -> Iterator[None]:
    """Inside this context, rows and columns that are all zero (removed units or heads) hold small random numbers.

    Zeros would hide the structure from the probe. They are restored at the end.
    """
    changed: list[tuple[Tensor, Tensor]] = []
    try:
        for name, parameter in block.named_parameters():
            weight = parameter.detach()
            # Fresh adapters have zeros. Of sharded weights a rank sees a part.
            if weight.dim() < 2 or "lora_" in name or weight.is_meta or isinstance(weight, DTensor):
                continue
            empty = ~(weight.any(-1, keepdim=True) & weight.any(-2, keepdim=True))
            if bool(empty.any()):
                changed.append((weight, empty))
                generator = torch.Generator(weight.device).manual_seed(0)
                weight.add_(torch.empty_like(weight).normal_(0, 0.02, generator=generator).mul_(empty))
        yield
    finally:
        for weight, empty in changed:
            weight.masked_fill_(empty, 0)


def _block_calls(
    model: PreTrainedModel, modules: Sequence[nn.Module], names: dict[nn.Module, str], run: RunModel
) -> list[BlockCall]:
    calls: dict[nn.Module, list[BlockCall]] = {module: [] for module in modules}
    order: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module].append(BlockCall.of(args, kwargs))
        order.append(module)

    def after(module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        calls[module][-1].end(returned)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        with refusing(
            f"Pruning needs a model that runs on token ids alone, but a forward of {type(model).__name__} fails"
        ):
            run(model, {"input_ids": _probe_ids(model)})
    for module in modules:
        if len(calls[module]) != 1:
            raise UserError(
                f"Every decoder block must run once in a forward, but {names[module]} of {type(model).__name__} ran "
                f"{len(calls[module])} times. Such a model cannot be solved block by block."
            )
    if order != list(modules):
        raise UserError(
            f"Decoder blocks must run in the order of their list, but those of {type(model).__name__} ran as "
            f"{', '.join(names[module] for module in order[:8])}, ..."
        )
    for module in modules:
        hidden = hidden_of(calls[module][0].args, calls[module][0].kwargs)
        shape = None if hidden is None else tuple(hidden.shape)
        if shape is None or order_of(shape) is None:
            raise UserError(
                f"Decoder blocks must get hidden states of (batch, sequence, ...), but {names[module]} of "
                f"{type(model).__name__} gets {shape} for {WINDOWS} windows of {TOKENS} tokens. This is not supported."
            )
    return [calls[module][0] for module in modules]


def _warn_of_other_links(
    model: PreTrainedModel, blocks: Sequence[Block], calls: Sequence[BlockCall], run: RunModel
) -> None:
    """Warn if a block gets more from earlier blocks than the hidden states that the previous block returns.

    Refuse the model if a block cannot run without such an input, because calibration does not supply it: there, blocks are
    called one after the other, with the arguments of a forward in which blocks only pass hidden states on.
    """
    for (before, block), (first, second) in zip(pairwise(blocks), pairwise(calls), strict=True):
        if not _equal(hidden_of(second.args, second.kwargs), hidden_states(first.returned)):
            rank_zero_warn(
                f"{block.name} of {type(model).__name__} gets other hidden states than {before.name} "
                "returns. Calibration leaves out what is between them, so that the result may be worse."
            )
            break
    passing: list[BlockCall] = []

    def pass_through(block: Block, *args: Any, **kwargs: Any) -> Any:
        passing.append(BlockCall(args, dict(kwargs)))
        hidden = hidden_of(args, kwargs)
        return hidden if block.returns is None else (hidden, *block.returns)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(patched_forward(block.module, partial(pass_through, block)))
        with refusing(
            f"Decoder blocks must need nothing from each other but hidden states, but a forward of {type(model).__name__} in "
            "which they only pass these on fails"
        ):
            run(model, {"input_ids": _probe_ids(model)})
    warned = False
    for block, call, alone in zip(blocks, calls, passing, strict=True):
        others = [name for name in call.kwargs if name != "hidden_states"]
        differing = [name for name in others if not _equal(call.kwargs[name], alone.kwargs.get(name))]
        differing += [] if _equal(call.args[1:], alone.args[1:]) else ["an argument without a name"]
        if not differing:
            continue
        with refusing(
            f"A decoder block must run on hidden states alone, but {block.name} of {type(model).__name__} needs {differing[0]} "
            "from the blocks before it",
            ". Such blocks are not supported.",
        ):
            alone.again(block.module)
        if not warned:
            rank_zero_warn(
                f"{block.name} of {type(model).__name__} gets more than hidden states from the blocks before it: "
                f"{differing[0]}. Calibration goes without, so that the result may be worse."
            )
            warned = True


def _equal(one: Any, other: Any) -> bool:
    """Whether tensors are equal, also inside tuples, lists and dicts. What is no tensor counts as equal."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape:
            return False
        return bool(((one == other) | (one != one)).all())  # NaN is found elsewhere
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if type(one) is dict and type(other) is dict:
        return all(_equal(value, other.get(key)) for key, value in one.items())
    return True


def _probe_ids(model: PreTrainedModel) -> Tensor:
    """Token ids, none of which has a meaning of its own (padding, image)."""
    special = set(_special_ids(model.config.to_dict()))
    ids: list[int] = []
    generator = torch.Generator().manual_seed(0)
    for candidate in torch.randint(vocabulary_of(model), (4096,), generator=generator).tolist():
        if candidate not in special:
            ids.append(candidate)
    return torch.tensor(ids[: WINDOWS * TOKENS], device=device_of(model)).view(WINDOWS, TOKENS)


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif isinstance(key, str) and key.endswith(("_token_id", "_token_index", "_token_ids")):
            yield from [value] if isinstance(value, int) else value if isinstance(value, (list, tuple)) else []


def _check_distinct(model: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
    if len(set(modules)) < len(modules):
        raise UserError(
            f"Every decoder block must be a module of its own, but {len(modules)} blocks of {type(model).__name__} are only "
            f"{len(set(modules))} modules. A shared block cannot be solved for two places: copy it first."
        )
