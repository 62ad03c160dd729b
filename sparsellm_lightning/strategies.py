"""What the walker needs from the Trainer's strategy, behind one interface: one small adapter per strategy.

Every adapter splits the rows of a weight over the data-parallel ranks the same way, so the solver need not know how the
strategy stores it: a plain parameter is whole on every rank (single device, DDP), a ``DTensor`` is sharded by rows (FSDP2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from transformers import Cache, PreTrainedModel

from sparsellm_lightning.architectures import DecoderLayout, Projection, device_of
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.products import fastest_float32
from sparsellm_lightning.ranks import SINGLE, ProcessGroupRanks, Ranks


class StrategyAdapter:
    """A single device: every weight is whole and in place. The other adapters override what differs."""

    # Whether a forward is a collective, so that all ranks must make the same number of them.
    forward_is_collective = False
    # Whether the local part of a parameter is a piece of it, rather than the whole on every rank.
    weights_are_split = False

    def __init__(self, strategy: Strategy | None = None) -> None:
        self.strategy = strategy
        self.ranks: Ranks = SINGLE

    def check(self, layout: DecoderLayout) -> None:
        """Refuse a model that is laid out over ranks in a way that is not supported."""

    @contextmanager
    def calibrating(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode, compiled modules run eagerly, products are as fast as float32 can be; modes and the random state
        are put back at the end.

        Hooks inside a compiled block would silently not fire, hence the stance.
        """
        modes = {module: module.training for module in model.modules()}
        stance = getattr(torch.compiler, "set_stance", None)
        model.eval()
        try:
            eager = stance("force_eager") if stance else nullcontext()
            with isolate_rng(), eager, fastest_float32(device_of(model)):
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context of the calibration forward, such as autocast."""
        return nullcontext() if self.strategy is None else self.strategy.precision_plugin.forward_context()

    def holding(self, block: nn.Module) -> AbstractContextManager[Any]:
        """Context of several forwards of a block, between which no weight changes."""
        return nullcontext()

    def run_model(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        """Run the model for the sake of its blocks' inputs; the head is left out where it can be."""
        model.base_model(**inputs, use_cache=False)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor | None:
        """Logits of this rank's part of an evaluation batch; None where the rank has no part in it."""
        if not len(inputs["input_ids"]):
            return None
        with self.forward_context():
            logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    def next_logits(self, model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
        """Logits of the token after ``ids``, (batch, vocabulary).

        Args:
            model: with a language-model head.
            ids: (batch, new) tokens that the cache does not hold yet.
            cache: keys and values of the tokens before, to which those of ``ids`` are added in place.
        """
        # The argument's old name goes in transformers 5.40, the new one came after 5.20.
        known = inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"cache" if "cache" in known else "past_key_values": cache}
        if "logits_to_keep" in known:
            options["logits_to_keep"] = 1
        with self.forward_context():
            logits: Tensor = self._through_root(lambda: model(input_ids=ids, use_cache=True, **options)).logits
        return logits[:, -1]

    def _through_root(self, call: Callable[[], Any]) -> Any:
        """Make a call as the strategy needs a forward to be made."""
        return call()

    def read_rows(self, projection: Projection) -> Tensor:
        """This rank's rows of a weight as (rows, in features) float32: a copy."""
        rows = self.ranks.local_rows(projection.shape[0])
        return _as_rows(projection, projection.parameter.detach())[rows].to(torch.float32, copy=True).contiguous()

    def write_rows(self, projection: Projection, rows: Tensor) -> None:
        """Put this rank's rows into the parameter, in place, cast to its dtype; all ranks call it together."""
        rows = rows.to(projection.parameter.dtype)
        self.write_whole(projection, self.ranks.gather_rows(rows, projection.shape[0]))

    def whole(self, projection: Projection) -> Tensor:
        """The whole weight as float32, on every rank; never called for more than one block's weights at a time."""
        return _as_rows(projection, projection.parameter.detach()).to(torch.float32, copy=True).contiguous()

    def write_whole(self, projection: Projection, weight: Tensor) -> None:
        """Put a weight, which every rank has whole, into the parameter, in place, cast to its dtype."""
        with torch.no_grad():
            projection.parameter.copy_(_as_rows(projection, weight))

    def whole_bias(self, projection: Projection) -> Tensor | None:
        """The whole bias as float32, or None."""
        return None if projection.bias is None else projection.bias.detach().float()

    def count_zeros(self, projection: Projection) -> Tensor:
        """Zeros in this rank's part of the weight, so that the sum over ranks counts each entry once."""
        return (self.read_rows(projection) == 0).sum()

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        """The model's whole state on rank 0; None where ``model.state_dict()`` is that already."""
        return None

    def finish(self, model: nn.Module) -> None:
        """Leave the model as the strategy expects it for training and checkpoints."""


class DDPAdapter(StrategyAdapter):
    """``DDPStrategy``: every rank has the whole weight; each solves its rows, and they are exchanged."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__(strategy)
        self.ranks = ProcessGroupRanks()


class _ShardedAdapter(StrategyAdapter):
    """What FSDP1 and FSDP2 share: every forward gathers parameters, and must go through the root module."""

    forward_is_collective = True
    weights_are_split = True

    def run_model(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        # The root's own forward is needed for its parameters, so the head can only be cut to one position.
        one = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._through_root(lambda: model(**inputs, **one, use_cache=False))

    def logits(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor | None:
        part = inputs if len(inputs["input_ids"]) else {"input_ids": inputs["input_ids"].new_zeros(1, 2)}
        with self.forward_context():
            logits: Tensor = self._through_root(lambda: model(**part, use_cache=False)).logits
        return logits if len(inputs["input_ids"]) else None

    def _through_root(self, call: Callable[[], Any]) -> Any:
        """Make a call inside the forward of the outermost wrapped module, whose hooks gather its parameters."""
        assert self.strategy is not None
        module = self.strategy.lightning_module
        outer = self.strategy.model
        if not isinstance(outer, (FSDPModule, FullyShardedDataParallel)):
            return call()
        assert module is not None
        assert outer is not None
        with patched_forward(module, call):
            return outer()


class FSDP2Adapter(_ShardedAdapter):
    """``ModelParallelStrategy`` with data parallelism only: each rank solves exactly its shard, edited in place."""

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        super().__init__(strategy)
        mesh = strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise UserError(
                "Pruning supports ModelParallelStrategy with data parallelism (FSDP2) only, got tensor_parallel_size "
                f"{mesh['tensor_parallel'].size()}. Set tensor_parallel_size=1 and data_parallel_size to the number of devices."
            )
        self.ranks = ProcessGroupRanks(mesh["data_parallel"].get_group())

    def check(self, layout: DecoderLayout) -> None:
        for block in layout.blocks:
            if not any(isinstance(module, FSDPModule) for module in block.module.modules()):
                raise UserError(
                    f"Every decoder block must be sharded on its own, but {block.name} is not: pruning it would gather the "
                    "whole model. Call fully_shard on each block, then on the model, in configure_model()."
                )
        for projection in layout.projections():
            parameter = projection.parameter
            if isinstance(parameter, DTensor) and tuple(parameter.placements) != (Shard(0),):
                raise UserError(
                    f"Pruning supports FSDP2 shards along dimension 0 of a one-dimensional mesh, got placements "
                    f"{tuple(parameter.placements)} for {projection.name} (hybrid or tensor parallel). "
                    "Use ModelParallelStrategy with tensor_parallel_size=1 and plain fully_shard."
                )

    @contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        # Gather the block once for all batches, not once a batch.
        modules = [module for module in block.modules() if isinstance(module, FSDPModule)]
        settings = [_reshards_after_forward(module) for module in modules]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module, setting in zip(modules, settings, strict=True):
                module.reshard()
                module.set_reshard_after_forward(setting, recurse=False)

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
        return _as_rows(projection, self._gathered(projection.parameter)).float().contiguous()

    def write_whole(self, projection: Projection, weight: Tensor) -> None:
        parameter = projection.parameter.detach()
        if not isinstance(parameter, DTensor):
            super().write_whole(projection, weight)
            return
        stored = _as_rows(projection, weight)
        parameter.to_local().copy_(stored[self.ranks.local_rows(stored.shape[0])])

    def whole_bias(self, projection: Projection) -> Tensor | None:
        return None if projection.bias is None else self._gathered(projection.bias).float()

    def count_zeros(self, projection: Projection) -> Tensor:
        parameter = projection.parameter.detach()
        return (parameter.to_local() == 0).sum() if isinstance(parameter, DTensor) else super().count_zeros(projection)

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
        # The root keeps its parameters gathered after a forward; a full checkpoint would then fail.
        for module in (self.strategy.model or model).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gathered(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return self.ranks.gather_rows(tensor.to_local(), tensor.shape[0]) if isinstance(tensor, DTensor) else tensor

    def _on_rank_zero(self, tensor: Tensor) -> Tensor | None:
        """The whole of a tensor, on the CPU of rank 0 only."""
        if isinstance(tensor, DTensor):
            gathered = self.ranks.gather_rows_to_first(tensor.to_local(), tensor.shape[0])
            return None if gathered is None else gathered.cpu()
        return tensor.cpu() if self.ranks.rank == 0 else None


class FSDP1Adapter(_ShardedAdapter):
    """``FSDPStrategy`` (FSDP1): a block's weights are gathered to be read and written, since shards are flat pieces."""

    def __init__(self, strategy: FSDPStrategy) -> None:
        super().__init__(strategy)
        if strategy.sharding_strategy is not None and "HYBRID" in strategy.sharding_strategy.name:
            raise UserError(
                f"Pruning supports FSDPStrategy with FULL_SHARD or SHARD_GRAD_OP, got {strategy.sharding_strategy.name}. "
                "Set sharding_strategy='FULL_SHARD'."
            )
        self.ranks = ProcessGroupRanks()

    def check(self, layout: DecoderLayout) -> None:
        for block in layout.blocks:
            if not isinstance(block.module, FullyShardedDataParallel):
                raise UserError(
                    f"Every decoder block must be wrapped on its own, but {block.name} is not: pruning it would gather the "
                    "whole model. Pass FSDPStrategy(auto_wrap_policy={DecoderLayerClass})."
                )

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
            bias: Tensor = projection.bias.detach().to(torch.float32, copy=True)
        return bias

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]

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


_ADAPTERS: dict[type[Strategy], Callable[[Any], StrategyAdapter]] = {
    SingleDeviceStrategy: StrategyAdapter,
    DDPStrategy: DDPAdapter,
    ModelParallelStrategy: FSDP2Adapter,
    FSDPStrategy: FSDP1Adapter,
}


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter:
    """The adapter of the Trainer's strategy.

    Raises:
        UserError: the strategy, or the way it is set up, is not supported.
    """
    strategy = type(trainer.strategy)
    # A user's subclass works as its base does; Lightning's own (DeepSpeed derives from DDP) are strategies of their own.
    theirs = not strategy.__module__.startswith(("lightning.", "pytorch_lightning."))
    for supported in strategy.__mro__ if theirs else (strategy,):
        if supported in _ADAPTERS:
            return _ADAPTERS[supported](trainer.strategy)
    raise UserError(
        f"Pruning supports the strategies {', '.join(s.__name__ for s in _ADAPTERS)}, "
        f"got {type(trainer.strategy).__name__}. Choose one of these with Trainer(strategy=...)."
    )


def _as_rows(projection: Projection, weight: Tensor) -> Tensor:
    """(out, in) view of a stored weight, or the stored view of an (out, in) one."""
    return weight.T if projection.transposed else weight


def _local_shard(projection: Projection) -> Tensor | None:
    """This rank's rows as stored, where the shard is one of rows; None where it is not."""
    parameter = projection.parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) and not projection.transposed else None


def _reshards_after_forward(module: FSDPModule) -> bool:
    """The setting that ``set_reshard_after_forward`` changes; torch has no public way to read it."""
    group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
    return bool(getattr(group, "_reshard_after_forward", True))


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward for a while; hooks on the module still run around it."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own
