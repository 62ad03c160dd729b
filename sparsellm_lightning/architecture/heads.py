"""Attention that treats its heads alike and apart, so that some can be removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architecture.feed_forward import Run, close
from sparsellm_lightning.architecture.layout import Attention, Linears, Projection, Unit


def find_attention(
    run: Run, units: Sequence[Unit], heads: int | None, outermost: Callable[[nn.Module], nn.Module]
) -> Attention | None:
    """Queries, keys, values and output of a block, if :func:`attends_by_heads` holds for them. None otherwise.

    Args:
        run: a forward of the block.
        units: of the block.
        heads: number of query heads. None: not known.
        outermost: the module around a linear layer that has its name.
    """
    if heads is None:
        return None
    linears = [unit.projections for unit in units if isinstance(unit, Linears)]
    for first, last in pairwise(linears):
        found = _of_these_shapes(first, last, heads)
        if found is not None and attends_by_heads(run, found, outermost):
            return found
    return None


def _of_these_shapes(first: Sequence[Projection], last: Sequence[Projection], heads: int) -> Attention | None:
    """Attention by its shapes alone: three projections of one input, or three parts of one, and one that follows."""
    if len(first) == 1 and len(first[0].parts) == 3:
        sizes = list(first[0].parts)
        inputs = [(first[0], sum(sizes[:part])) for part in range(3)]
    elif len(first) == 3:
        inputs = [(p, 0) for p in sorted(first, key=lambda p: -p.shape[0])]
        sizes = [p.shape[0] for p, _ in inputs]
    else:
        return None
    width = last[0].shape[1]
    if len(last) > 1 or width % heads or sizes[0] != width or sizes[1] != sizes[2] or sizes[1] % (width // heads):
        return None
    groups = sizes[1] // (width // heads)
    return None if heads % groups else Attention(tuple(inputs), last[0], heads, groups)


def attends_by_heads(run: Run, attention: Attention, outermost: Callable[[nn.Module], nn.Module]) -> bool:
    """Whether permuting the heads permutes the output projection's input, and a head that is zero changes no other head.

    Norms over all heads, biases by head (ALiBi) and learned sinks fail this.

    Args:
        run: a forward of the block.
        attention: to try.
        outermost: the module around a linear layer that has its name.
    """
    kept = torch.ones(attention.removable, dtype=torch.bool)
    kept[0] = False
    modules = {p.name: outermost(p.module) for p in attention.projections}

    def changed(mask: Tensor, order: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda _, args, y: (y * mask.to(y.device))[..., order.to(y.device)]

    orders = {name: torch.arange(len(mask)) for name, mask in attention.rows(kept).items()}
    for p, first, size in attention.spans():
        orders[p.name][first : first + size] = first + _moved(size, attention.removable)
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        output = modules[attention.output.name]
        hooks.callback(output.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone())).remove)
        run()
        for name, mask in attention.rows(kept).items():
            hooks.callback(modules[name].register_forward_hook(changed(mask, orders[name])).remove)
        try:
            run()
        except RuntimeError:  # of another shape
            return False
    before, after = seen
    columns = attention.columns(kept).to(before.device)
    order = _moved(len(columns), attention.removable).to(before.device)
    return close(after * columns[order], (before * columns)[..., order])


def _moved(size: int, parts: int) -> Tensor:
    """Indices of a vector whose parts move on by one, the last becoming the first."""
    return torch.arange(size).view(parts, -1).roll(1, 0).flatten()
