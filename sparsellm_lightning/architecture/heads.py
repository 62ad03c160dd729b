"""Whether attention treats its heads alike and apart, so that some can leave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm_lightning.architecture.feed_forward import Run, close
from sparsellm_lightning.architecture.layout import Attention


def attends_by_heads(run: Run, attention: Attention, outermost: Callable[[nn.Module], nn.Module]) -> bool:
    """Whether heads that change places do so in what the output projection sees, without regard to one that becomes zero.

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
