"""``ModelParallelStrategy`` with data parallelism only (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import DecoderLayout, Projection
from sparsellm_lightning.distributed.adapter import copied, local_tensor
from sparsellm_lightning.distributed.ranks import ProcessGroupRanks
from sparsellm_lightning.distributed.sharded import ShardedAdapter
from sparsellm_lightning.errors import UserError


class FSDP2Adapter(ShardedAdapter):
    """Each rank solves its shard and edits it in place."""

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        super().__init__(strategy)
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                "Pruning supports ModelParallelStrategy with data parallelism (FSDP2) only, got tensor_parallel_size "
                f"{mesh['tensor_parallel'].size()}. Set tensor_parallel_size=1 and data_parallel_size to the number of devices."
            )
        self.ranks = ProcessGroupRanks(mesh["data_parallel"].get_group(), strategy.root_device)

    def check(self, layout: DecoderLayout) -> None:
        for block in layout.blocks:
            inside = [module for module in block.module.modules() if isinstance(module, FSDPModule)]
            sharded = {id(p) for unit in inside for p in unit.parameters() if isinstance(p, DTensor)}
            left = next((name for name, p in block.module.named_parameters() if id(p) not in sharded), None)
            if left is not None:
                raise UserError(
                    f"Every decoder block must be sharded on its own and as a whole, but {left} of {block.name} is not: its "
                    "changes would be lost, or differ on each rank. Call fully_shard on each block, without ignored_params, "
                    "then on the model, in configure_model()."
                )
        units = [module for module in layout.model.modules() if isinstance(module, FSDPModule)]
        if any(getattr(unit._get_fsdp_state(), "_states_to_forward_prefetch", None) for unit in units):
            raise UserError(
                "Pruning changes a block after the one before has run, but set_modules_to_forward_prefetch has gathered it by "
                "then. Call that after pruning."
            )
        for projection in layout.projections():
            parameter = projection.parameter
            if isinstance(parameter, DTensor) and tuple(parameter.placements) != (Shard(0),):
                raise UserError(
                    f"Pruning supports FSDP2 shards along dimension 0 of a one-dimensional mesh, got placements "
                    f"{tuple(parameter.placements)} for {projection.name} (hybrid or tensor parallel). "
                    "Use ModelParallelStrategy with tensor_parallel_size=1 and plain fully_shard."
                )
            there, here = local_tensor(parameter).device.type, self.ranks.device.type
            if there != here:
                raise UserError(
                    f"Pruning needs shards on the device that solves them, {here}, but {projection.name} lies on {there}. "
                    "Leave CPUOffloadPolicy out of fully_shard."
                )

    @contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        # The block stays gathered for all batches.
        modules = [module for module in block.modules() if isinstance(module, FSDPModule)]
        settings = [_setting(module, "_reshard_after_forward", True) for module in modules]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module, setting in zip(modules, settings, strict=True):
                # A unit inside the block whose forward was stopped stays gathered otherwise, and what is written to it is lost.
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
                module.set_reshard_after_forward(setting, recurse=False)

    @contextmanager
    def tuning(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        # Ranks reduce the gradients of a unit in one exchange, whose size must not depend on the experts that each has used.
        units = [unit for module in modules for unit in module.modules() if isinstance(unit, FSDPModule)]
        known = [unit for unit in units if hasattr(unit, "set_reduce_scatter_unused_params")]  # not in older torch
        settings = [_setting(unit, "reduce_scatter_unused_params", False) for unit in known]
        for unit in known:
            unit.set_reduce_scatter_unused_params(True, recurse=False)
        try:
            yield
        finally:
            for unit, setting in zip(known, settings, strict=True):
                unit.set_reduce_scatter_unused_params(setting, recurse=False)

    def read_rows(self, projection: Projection) -> Tensor:
        local = _local_shard(projection)
        if local is None:
            rows = self.ranks.local_rows(projection.shape[0])
            return self.whole(projection)[rows].contiguous()
        return local.to(torch.float32, copy=True)

    def write_rows(self, projection: Projection, rows: Tensor) -> None:
        local = _local_shard(projection)
        if local is None:
            super().write_rows(projection, rows)
        else:
            local.copy_(rows)

    def whole(self, projection: Projection) -> Tensor:
        if projection.expert is not None and isinstance(projection.parameter, DTensor):
            mine = self._mine(projection)
            device = projection.parameter.to_local().device
            whole = torch.zeros(projection.shape, device=device) if mine is None else copied(mine)
            self.ranks.sum_(whole)  # the other ranks have zeros
            return whole
        return copied(projection.of(self._gathered(projection.parameter)))

    def write_whole(self, projection: Projection, weight: Tensor) -> None:
        parameter = projection.parameter.detach()
        if not isinstance(parameter, DTensor):
            super().write_whole(projection, weight)
            return
        if projection.expert is not None:
            mine = self._mine(projection)
            if mine is not None:
                mine.copy_(weight)
            return
        if projection.is_whole:
            stored = weight.T if projection.transposed else weight
        else:
            stored = self._gathered(parameter)
            projection.of(stored).copy_(weight)
        parameter.to_local().copy_(stored[self.ranks.local_rows(stored.shape[0])])

    def whole_bias(self, projection: Projection) -> Tensor | None:
        return None if projection.bias is None else projection.bias_of(self._gathered(projection.bias)).float()

    def count_zeros(self, projection: Projection) -> Tensor:
        parameter = projection.parameter.detach()
        if isinstance(parameter, DTensor) and projection.is_whole:
            return (parameter.to_local() == 0).sum()
        if isinstance(parameter, DTensor) and projection.expert is not None:
            mine = self._mine(projection)
            return parameter.to_local().new_zeros((), dtype=torch.long) if mine is None else (mine == 0).sum()
        return super().count_zeros(projection)

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        whole: dict[str, Tensor] = {}
        seen: dict[int, Tensor | None] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # tied parameters travel once
                seen[id(tensor)] = self._on_rank_zero(tensor.detach())
            gathered = seen[id(tensor)]
            if gathered is not None:
                whole[name] = gathered
        return whole

    def finish(self, model: nn.Module) -> None:
        assert self.strategy is not None
        # The root keeps its parameters gathered after a forward, and then a full checkpoint fails.
        for module in (self.strategy.model or model).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _mine(self, projection: Projection) -> Tensor | None:
        """An expert's matrix, sharing memory with the parameter, on the rank that holds the expert. None on other ranks."""
        parameter = projection.parameter.detach()
        held = self.ranks.local_rows(parameter.shape[0])
        assert projection.expert is not None
        if not held.start <= projection.expert < held.stop:
            return None
        return replace(projection, expert=projection.expert - held.start).of(parameter.to_local())  # type: ignore[attr-defined]

    def _gathered(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return self.ranks.gather_rows(tensor.to_local(), tensor.shape[0]) if isinstance(tensor, DTensor) else tensor

    def _on_rank_zero(self, tensor: Tensor) -> Tensor | None:
        """The whole of a tensor, on the CPU of rank 0 only."""
        if isinstance(tensor, DTensor):
            gathered = self.ranks.gather_rows_to_first(tensor.to_local(), tensor.shape[0])
            return None if gathered is None else gathered.cpu()
        return tensor.cpu() if self.ranks.rank == 0 else None


def _local_shard(projection: Projection) -> Tensor | None:
    """This rank's rows as stored. None if the parameter is not sharded by the rows of this matrix."""
    parameter = projection.parameter.detach()
    by_rows = isinstance(parameter, DTensor) and not projection.transposed and projection.is_whole
    return parameter.to_local() if by_rows else None  # type: ignore[attr-defined]


def _setting(module: FSDPModule, name: str, default: bool) -> bool:
    """A setting of a unit's parameters, which torch has no public way to read."""
    group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
    return bool(getattr(group, name, default))
