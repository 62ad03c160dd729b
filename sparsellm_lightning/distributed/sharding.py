"""FSDP2 for :class:`~sparsellm_lightning.CausalLM`: every decoder block is a unit, and one rank reads the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import decoder_blocks
from sparsellm_lightning.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """``strategy: fsdp2``: Lightning's ``ModelParallelStrategy`` with all devices in one data-parallel group.

    Args:
        save_distributed_checkpoint: true: a folder with one file a rank. False: one file, assembled on rank 0.
        process_group_backend: ``nccl``, ``gloo``, ... None: the accelerator's.
        timeout: longest time of one exchange between ranks, such as the wait while rank 0 downloads or reads a model.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(hours=4),
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        # The number of processes is known from here on. "auto" would mean tensor parallelism inside each node.
        self._data_parallel_size = self.num_nodes * self.num_processes
        # As Lightning's launcher does, which ModelParallelStrategy has in the first process only.
        if self.cluster_environment is None or not self.cluster_environment.creates_processes_externally:
            _set_num_threads_if_needed(self.num_processes)
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, all devices in one data-parallel group")


def shard_blocks(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Apply ``fully_shard`` to every decoder block, then to the model, as pruning under FSDP2 needs.

    All trained parameters of a unit must have one dtype, so modules with another dtype (routers that stay float32) become units
    of their own. The same holds for frozen parameters, because pruning tunes the frozen weights that have adapters.

    Args:
        model: sharded in place, and returned.
        mesh: one-dimensional, such as ``self.device_mesh["data_parallel"]`` of a module under ``ModelParallelStrategy``.

    Raises:
        UserError: a module holds parameters of several dtypes.
    """
    for root in (*decoder_blocks(model), model):
        for trains in (True, False):
            own = (p for module in _outside_units(root) for p in module.parameters(recurse=False))
            if len(_dtypes(own, trains)) > 1:
                _shard_other_dtypes(root, model.dtype, mesh, trains)
        fully_shard(root, mesh=mesh)
    return model


def _shard_other_dtypes(root: nn.Module, dtype: torch.dtype, mesh: DeviceMesh, trains: bool) -> None:
    """Make units of the modules inside that hold trained or frozen parameters of other dtypes, and of what is inside these."""
    for module in reversed(_outside_units(root)):  # children first
        own = _dtypes(module.parameters(recurse=False), trains)
        if trains and len(own) > 1:
            names = ", ".join(f"{name} ({p.dtype})" for name, p in module.named_parameters(recurse=False))
            raise UserError(
                f"FSDP2 shards parameters of one dtype together, but {type(module).__name__} holds {names}, in a model of "
                f"{dtype}. Set model.dtype to float32."
            )
        outside = _outside_units(root)
        if own - {dtype} and module in outside:
            # A layer with adapters reads their weights itself, so that it is one unit with them.
            adapted = [layer for layer in outside if hasattr(layer, "base_layer") and module in layer.modules()]
            for child in adapted[:1] or reversed(_outside_units(module)):
                if child is not root and any(True for _ in child.parameters(recurse=bool(adapted))):
                    fully_shard(child, mesh=mesh)


def _outside_units(root: nn.Module) -> list[nn.Module]:
    """A module and those inside it, without what other units hold. Parents come before their children."""
    found = [root]
    for child in root.children():
        found += [] if isinstance(child, FSDPModule) else _outside_units(child)
    return found


def _dtypes(parameters: Iterable[nn.Parameter], trains: bool) -> set[torch.dtype]:
    """The floating-point dtypes of the parameters that are trained, or that are not."""
    return {p.dtype for p in parameters if p.requires_grad == trains and p.is_floating_point()}


def load_sharded(
    load: Callable[[], PreTrainedModel],
    mesh: DeviceMesh,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> PreTrainedModel:
    """Load a model over the ranks of a mesh: rank 0 reads it and sends each rank its shards.

    The other ranks never hold the whole model, neither on the host nor on the device.

    Args:
        load: returns the whole model. Called on rank 0.
        mesh: one-dimensional.
        prepare: changes the model in place before it is sharded (LoRA adapters). Called on every rank.

    Raises:
        UserError: rank 0 cannot load the model. Raised on every rank.
    """
    source: PreTrainedModel | None = None
    described: tuple[Any, ...] | None = None
    dtypes: dict[str, torch.dtype] = {}
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            source = load()
            described = _description(source)
            prepare(source)
            dtypes = {name: parameter.dtype for name, parameter in source.named_parameters()}
        except Exception as error:
            failure = error
    message: list[Any] = [failure, described, dtypes]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise message[0]
    cls, config, generation_config, model_dtype, buffers = message[1]
    with torch.device("meta"):
        model: PreTrainedModel = cls(copy.deepcopy(config)).to(model_dtype)
    model.tie_weights()
    model.generation_config = generation_config
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer.to(mesh.device_type)
    with torch.device("meta"):
        prepare(model)
    for name, parameter in model.named_parameters():  # some stay float32, and adapters are made in float32 here
        parameter.data = parameter.data.to(message[2][name])
    shard_blocks(model, mesh)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if source is None else source.state_dict(), options=options)
    model.eval()
    return model


def _description(model: PreTrainedModel) -> tuple[Any, ...]:
    return type(model), model.config, model.generation_config, model.dtype, dict(model.named_buffers())
