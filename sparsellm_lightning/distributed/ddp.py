"""``DDPStrategy``."""

from __future__ import annotations

from lightning.pytorch.strategies import Strategy

from sparsellm_lightning.distributed.adapter import StrategyAdapter
from sparsellm_lightning.distributed.ranks import ProcessGroupRanks


class DDPAdapter(StrategyAdapter):
    """Every rank has the whole weight. Each solves its rows, and the rows are exchanged."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.ranks = ProcessGroupRanks(device=strategy.root_device)
