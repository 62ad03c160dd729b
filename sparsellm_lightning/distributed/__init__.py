"""Running over several processes: one adapter for each supported strategy, and the ranks' collectives."""

from sparsellm_lightning.distributed.adapter import StrategyAdapter, local_tensor
from sparsellm_lightning.distributed.choose import adapter_for
from sparsellm_lightning.distributed.first import failing_with_first
from sparsellm_lightning.distributed.ranks import PeerError, ProcessGroupRanks, ranks_on_this_host
from sparsellm_lightning.distributed.sharding import FSDP2Strategy, load_sharded, shard_blocks

__all__ = [
    "FSDP2Strategy",
    "PeerError",
    "ProcessGroupRanks",
    "StrategyAdapter",
    "adapter_for",
    "failing_with_first",
    "load_sharded",
    "local_tensor",
    "ranks_on_this_host",
    "shard_blocks",
]
