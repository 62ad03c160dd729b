"""``FSDPStrategy`` (FSDP1), for which Lightning asks for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import DecoderLayout, Projection, unwrapped
from sparsellm_lightning.distributed.ranks import ProcessGroupRanks
from sparsellm_lightning.distributed.sharded import ShardedAdapter
from sparsellm_lightning.errors import UserError


class FSDP1Adapter(ShardedAdapter):
    """Shards are flat pieces, so a weight is gathered to be read or written."""

    def __init__(self, strategy: FSDPStrategy) -> None:
        super().__init__(strategy)
        self.sharding = getattr(strategy.sharding_strategy, "name", "FULL_SHARD")
        if "HYBRID" in self.sharding or self.sharding == "NO_SHARD":
            raise UserError(
                f"FSDPStrategy is supported with FULL_SHARD, and SHARD_GRAD_OP for sparse models, got {self.sharding}. "
                "Set sharding_strategy='FULL_SHARD'."
            )
        if getattr(strategy.cpu_offload, "offload_params", False):
            raise UserError(
                "FSDPStrategy with cpu_offload keeps shards where GPUs cannot exchange them. Leave cpu_offload out."
            )
        self.prefetches = bool(strategy.kwargs.get("forward_prefetch"))
        if not strategy.kwargs.get("use_orig_params", True):
            raise UserError(
                "FSDPStrategy must keep the parameters of single layers, got use_orig_params False. Leave it out."
            )
        self.ranks = ProcessGroupRanks(device=strategy.root_device)

    def check(self, layout: DecoderLayout) -> None:
        if self.prefetches:
            raise UserError(
                "Pruning changes a block after the one before has run, but with forward_prefetch FSDPStrategy has gathered it "
                "by then. Leave forward_prefetch out."
            )
        if self.sharding != "FULL_SHARD":  # SHARD_GRAD_OP runs on with gathered weights from before they were pruned
            raise UserError(
                f"Pruning needs FSDPStrategy with FULL_SHARD, got {self.sharding}. Set sharding_strategy='FULL_SHARD'. A "
                "sparse model may be trained with SHARD_GRAD_OP."
            )
        if self.ranks.size == 1:  # torch leaves blocks without parameters after a gradient there
            raise UserError("FSDPStrategy shards a model over several processes, but there is one. Leave strategy out.")
        for block in layout.blocks:
            if not isinstance(block.module, FullyShardedDataParallel):
                raise UserError(
                    f"Every decoder block must be wrapped on its own, but {block.name} is not: pruning it would gather the "
                    "whole model. Pass FSDPStrategy(auto_wrap_policy={DecoderLayerClass})."
                )
            inside = [unit for unit in FullyShardedDataParallel.fsdp_modules(block.module) if unit is not block.module]
            if inside:  # torch leaves a unit gathered whose forward ends early
                raise UserError(
                    f"Decoder blocks must be wrapped as a whole, but {type(inside[0].module).__name__} inside {block.name} is "
                    "wrapped too. Name the decoder layer's class alone in FSDPStrategy's auto_wrap_policy."
                )
        self.check_visible()

    def check_visible(self) -> None:
        assert self.strategy is not None
        assert self.strategy.model is not None
        for unit in FullyShardedDataParallel.fsdp_modules(self.strategy.model):
            flat = getattr(unit._handle, "flat_param", None)  # only here does torch keep the shapes
            shapes = [] if flat is None else list(zip(flat._param_infos, flat._shapes, strict=True))
            if any(
                len(shape) == 3 and min(shape) > 1 and not isinstance(info.module, _ConvNd) for info, shape in shapes
            ):
                raise UserError(
                    f"FSDPStrategy hides parameters of three dimensions, such as the experts of {type(unit.module).__name__}. "
                    "Use ModelParallelStrategy (FSDP2)."
                )

    @contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        # Only the root's forward lets the stream that gathers wait for weights that were written.
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        yield

    def inner(self, block: nn.Module) -> nn.Module:
        assert isinstance(block, FullyShardedDataParallel)
        return block.module

    def with_gradient(self, forward: Callable[[], Tensor]) -> Tensor:
        # Only the backward of the root's output ends the state "in backward" of the units inside.
        output: Tensor = self._through_root(forward)
        return output

    def read_rows(self, projection: Projection) -> Tensor:
        return self.whole(projection)[self.ranks.local_rows(projection.shape[0])].contiguous()

    def whole(self, projection: Projection) -> Tensor:
        with self._summoned(projection, write=False):
            return super().whole(projection)

    def write_whole(self, projection: Projection, weight: Tensor) -> None:
        with self._summoned(projection, write=True):
            super().write_whole(projection, weight)

    def whole_bias(self, projection: Projection) -> Tensor | None:
        if projection.bias is None:
            return None
        with self._summoned(projection, write=False):
            return super().whole_bias(projection)

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        offload = self.ranks.device.type != "cpu"  # torch would free what it has "moved" to the CPU
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        assert self.strategy is not None
        outer = self.strategy.model  # gathers the parameters that belong to no block, which a module inside does not
        assert outer is not None
        state = get_model_state_dict(outer, options=options)
        (path,) = (name for name, module in outer.named_modules() if module is model)
        prefix = f"{unwrapped(path)}."
        return {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix) and isinstance(value, Tensor)
        }

    def _summoned(self, projection: Projection, write: bool) -> AbstractContextManager[Any]:
        assert self.strategy is not None
        assert self.strategy.model is not None
        units = [
            module
            for module in self.strategy.model.modules()
            if isinstance(module, FullyShardedDataParallel) and any(m is projection.module for m in module.modules())
        ]
        # The innermost unit that holds the projection comes last in the traversal.
        return FullyShardedDataParallel.summon_full_params(units[-1], recurse=False, writeback=write)
