"""The adapter of a Trainer's strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from sparsellm_lightning.distributed.adapter import StrategyAdapter
from sparsellm_lightning.distributed.fsdp1 import FSDP1Adapter
from sparsellm_lightning.distributed.fsdp2 import FSDP2Adapter
from sparsellm_lightning.distributed.ranks import ProcessGroupRanks
from sparsellm_lightning.errors import UserError

_ADAPTERS: dict[type[Strategy], Callable[[Any], StrategyAdapter]] = {
    SingleDeviceStrategy: StrategyAdapter,
    DDPStrategy: lambda strategy: StrategyAdapter(strategy, ProcessGroupRanks(device=strategy.root_device)),
    ModelParallelStrategy: FSDP2Adapter,
    FSDPStrategy: FSDP1Adapter,
}


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter:
    """The adapter of the Trainer's strategy.

    Raises:
        UserError: the strategy, or the way it is set up, is not supported.
    """
    strategy = type(trainer.strategy)
    # A user's subclass is treated as its base. Lightning's own subclasses are not (DeepSpeed derives from DDP).
    theirs = not strategy.__module__.startswith(("lightning.", "pytorch_lightning."))
    for supported in strategy.__mro__ if theirs else (strategy,):
        if supported in _ADAPTERS:
            return _ADAPTERS[supported](trainer.strategy)
    if strategy.__module__.startswith("pytorch_lightning."):
        raise UserError("Pruning needs a Trainer of lightning.pytorch, got one of pytorch_lightning. Import lightning.")
    raise UserError(
        f"Pruning supports the strategies {', '.join(s.__name__ for s in _ADAPTERS)}, "
        f"got {type(trainer.strategy).__name__}. Choose one of these with Trainer(strategy=...)."
    )
