"""The parameters of pruned blocks that a gradient tunes: kept weights, norms and biases, with the zeros held."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from sparsellm_lightning.architecture import Block, DecoderLayout, Experts, Linears
from sparsellm_lightning.calibration import Context
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.distributed import local_tensor
from sparsellm_lightning.solvers import Ranks, moved
from sparsellm_lightning.sparsity import pruned_before

STEP_TOKENS = 512  # tokens of a tuning step, over all ranks
WARM_UP = 0.1  # fraction of the steps. Without it the first steps undo much of the solver's work
LEAST_DENSITY = (
    0.01  # lower limit on ρ in the learning rate, because Adam's first steps are as large as the learning rate
)
LEAST_SCALE = 1e-3  # lower limit on rms in the learning rate, so that biases that are zero move too
LOSS_SCALE = 2.0**10  # of the losses, because float16 cannot hold gradients below 6e-8. Exact in other dtypes
VECTORS = 6  # of all kept entries: positions, values, gradients, Adam's two moments, the best state
BETAS = (0.9, 0.95)  # of Adam. The usual 0.999 averages over more steps than there are


class KeptParameters:
    """Parameters of some blocks, tuned by Adam without their zeros.

    A parameter's learning rate rises during :data:`WARM_UP` to ``learning_rate · rms / ρ`` and falls along a half cosine. rms
    is the root mean square of its kept entries, ρ their share. So the rate fits the scale of the weights, and is larger where
    fewer weights are left.

    Kept entries, their gradients and Adam's moments are float32 vectors in ``storage``, so that the memory shrinks with the
    sparsity. The entries of float32 parameters that lie there too are copied only while a step changes them. In the backward,
    the gradient of a parameter that is not sharded is reduced to its kept entries and freed at once.
    Gradients are summed over ranks, each of which has its own tokens. Sharded parameters are tuned shard by shard.

    Args:
        context: of the run.
        blocks: pruned. Their zeros stay zero, also those of projections that are ignored and were pruned before.
        learning_rate: in units of each parameter's scale.
        steps: that are planned.
        storage: of the vectors.
    """

    def __init__(
        self,
        context: Context,
        blocks: Sequence[Block],
        learning_rate: float,
        steps: int,
        storage: torch.device,
    ) -> None:
        self.adapter, self.ranks = context.adapter, context.ranks
        self.device = context.device
        self.storage = storage
        projections = [p for block in blocks for p in block.projections()]
        weights = {id(p.parameter) for p in projections}
        # What a module outside these blocks uses too stays as it is: tuning it would change that.
        everywhere = _uses(context.layout.model)
        inside = sum((_uses(block.module) for block in blocks), Counter[int]())
        found = {
            id(parameter): parameter
            for block in blocks
            for name, parameter in block.module.named_parameters()
            if id(parameter) in weights or "lora_" not in name
        }
        self.parameters = [parameter for key, parameter in found.items() if everywhere[key] == inside[key]]
        held = {id(p.parameter) for p in projections if p.pruned}
        ignored = [p for p in projections if id(p.parameter) not in held]
        held |= {id(p.parameter) for p in pruned_before(ignored, self.adapter)}
        self.locals = [local_tensor(parameter) for parameter in self.parameters]
        self.kept = [
            moved(_positions(local), self.storage) if id(parameter) in held else None
            for local, parameter in zip(self.locals, self.parameters, strict=True)
        ]
        self.values = [self._kept_of(index, local) for index, local in enumerate(self.locals)]
        groups = [
            {"params": [values], "lr": learning_rate * scale}
            for values, scale in zip(self.values, self._scales(), strict=True)
        ]
        self._release()
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _share_of_rate(step, steps))

    @property
    def below_float32(self) -> bool:
        """Whether some parameters are below float32."""
        return any(local.dtype != torch.float32 for local in self.locals)

    def loss_scale(self, tokens: int) -> float:
        """Factor to multiply a loss by before its backward. The loss is a sum over this rank's tokens of a step.

        ``tokens``: their number over all ranks. :meth:`step` then uses the gradient of the mean over all ranks' tokens.
        """
        # FSDP averages gradients over ranks when it scatters them.
        return LOSS_SCALE * (self.ranks.size if self.adapter.weights_are_split else 1) / max(tokens, 1)

    def collect(self) -> None:
        """Add the gradients of sharded parameters to those of the next step, and free them. For after each backward."""
        for index, parameter in enumerate(self.parameters):
            self._collect(index, parameter)

    def step(self) -> None:
        """Take the gradients of all ranks and change the parameters once."""
        summed = self.ranks.size > 1 and not self.adapter.weights_are_split
        for values in self.values:
            gradient = torch.zeros_like(values) if values.grad is None else values.grad
            if summed:
                gradient = gradient.to(self.device)  # what travels between ranks lies on their device
                self.ranks.sum_(gradient)
            values.grad = gradient.to(self.storage)
        for index, values in enumerate(self.values):
            if self._is_released(index):
                _refill(values, self._kept_of(index, self.locals[index]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self._store()

    def state(self) -> list[Tensor]:
        """A copy of the kept entries."""
        copies = [torch.empty_like(values) for values in self.values]
        self.update(copies)
        return copies

    def update(self, state: list[Tensor]) -> None:
        """Write the kept entries over an earlier copy, so that no second one is in memory."""
        for index, copied in enumerate(state):
            released = self._is_released(index)
            copied.copy_(self._kept_of(index, self.locals[index]) if released else self.values[index])

    def restore(self, state: list[Tensor]) -> None:
        """Go back to a copy."""
        for values, before in zip(self.values, state, strict=True):
            _refill(values, before)
        self._store()

    @contextmanager
    def trainable(self, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Only these parameters get gradients. Flags and gradients of the modules' parameters are restored at the end."""
        # FSDP sets the gradients of shards after these hooks.
        whole = [] if self.adapter.weights_are_split else list(enumerate(self.parameters))
        everything = [parameter for module in modules for parameter in module.parameters()]
        before = [(parameter.requires_grad, parameter.grad) for parameter in everything]
        tuned = {id(parameter) for parameter in self.parameters}
        for parameter in everything:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in tuned)
        hooks = [p.register_post_accumulate_grad_hook(partial(self._collect, index)) for index, p in whole]
        try:
            with self.adapter.tuning(modules):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, (requires_grad, gradient) in zip(everything, before, strict=True):
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

    def _collect(self, index: int, parameter: Tensor) -> None:
        """Add a parameter's gradient to that of the next step, and free it."""
        if parameter.grad is None:
            return
        gradient = self._kept_of(index, local_tensor(parameter.grad)).div_(LOSS_SCALE)
        parameter.grad = None
        values = self.values[index]
        values.grad = gradient if values.grad is None else values.grad.add_(gradient)

    def _kept_of(self, index: int, local: Tensor) -> Tensor:
        """The kept entries of a parameter or of its gradient, as a float32 vector of its own."""
        kept, flat = self.kept[index], local.detach().reshape(-1)
        if kept is None:
            return flat.to(self.storage, torch.float32, copy=True)
        return flat.index_select(0, kept.to(flat.device, non_blocking=True)).to(self.storage, torch.float32)

    def _is_released(self, index: int) -> bool:
        """Whether the values of a parameter are released between steps, because the parameter holds the same numbers."""
        local = self.locals[index]
        return local.dtype == torch.float32 and local.device == self.values[index].device

    def _release(self) -> None:
        for index, values in enumerate(self.values):
            if self._is_released(index):
                values.untyped_storage().resize_(0)

    def _store(self) -> None:
        """Write the kept entries into the parameters."""
        for local, kept, values in zip(self.locals, self.kept, self.values, strict=True):
            if kept is None:
                local.copy_(values.view(local.shape))
                continue
            flat = local.reshape(-1)  # a copy, if the parameter is not contiguous
            flat.index_copy_(0, kept.to(local.device, non_blocking=True).long(), values.to(local.device, local.dtype))
            if flat.data_ptr() != local.data_ptr():
                local.copy_(flat.view_as(local))
        self._release()

    def _scales(self) -> list[float]:
        """``rms / ρ`` of each parameter, over all of its shards, ρ being at least :data:`LEAST_DENSITY`."""
        sums = [
            [float(values.square().sum(dtype=torch.float64)), values.numel(), local.numel()]
            for values, local in zip(self.values, self.locals, strict=True)
        ]
        totals = torch.tensor(sums, dtype=torch.float64, device=self.device)
        if self.adapter.weights_are_split:
            self.ranks.sum_(totals)
        squares, entries, size = totals.clamp(min=1e-30).T
        rms = (squares / entries).sqrt().clamp(min=LEAST_SCALE)
        scales: list[float] = torch.minimum(rms * size / entries, rms / LEAST_DENSITY).tolist()
        return scales


def _refill(values: Tensor, source: Tensor) -> None:
    """Copy into a vector whose memory may have been released."""
    values.untyped_storage().resize_(values.numel() * values.element_size())
    values.copy_(source)


def _uses(module: torch.nn.Module) -> Counter[int]:
    """In how many places each parameter stands, by its ``id``."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def batches_of_a_step(ranks: Ranks, tokens: Sequence[int], wanted: int) -> int:
    """How many batches each rank takes in a step, so that the steps of all ranks together have about ``wanted`` tokens.

    All ranks make equally many forwards. No step takes more batches than the rank with most has.

    Args:
        ranks: call this together.
        tokens: of each of this rank's batches.
        wanted: tokens of a step.
    """
    shares = ranks.gather_counts(sum(tokens), len(tokens))
    together = sum(total / max(number, 1) for total, number in shares)
    return min(max(1, round(wanted / max(together, 1))), max(number for _, number in shares))


def in_random_order(batches: Sequence[int], together: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless iterator over steps: the batches of each step. Every round visits each batch once, in a new random order.

    If ``together`` is at most the number of batches, no step has a batch twice. Without batches, every list is empty.

    Args:
        batches: their indices.
        together: number in a step.
        generator: of the order, on the CPU.
    """
    queue: list[int] = []
    while True:
        while batches and len(queue) < together:
            drawn = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
            queue += sorted(drawn, key=queue.__contains__)
        chosen, queue = queue[:together], queue[together:]
        yield chosen


def memory_of_tuning(blocks: Sequence[Block], config: PruningConfig, split: bool = False) -> tuple[float, float]:
    """Bytes of gradients and of the vectors of all kept weights of some blocks, on this rank.

    If units, heads or blocks are removed, all weights count as kept, because how many go is not known yet. Whole parameters
    hold one gradient at a time. Those of sharded parameters (``split``) are held together.
    """
    pruned = {id(p.parameter) for block in blocks for p in block.projections() if p.pruned}
    parameters = [(id(p) in pruned, local_tensor(p)) for block in blocks for p in block.module.parameters()]
    zeros = 0.0 if config.removes else config.requested_sparsity
    kept = sum((1 - zeros * is_pruned) * p.numel() for is_pruned, p in parameters)
    gradients = [p.numel() * p.element_size() for _, p in parameters]
    return sum(gradients) if split else max(gradients), VECTORS * 4 * kept


def activations_of_tuning(layout: DecoderLayout, windows: int, length: int, cast: torch.dtype | None = None) -> float:
    """Estimated bytes that a forward of all blocks keeps for its backward on one device.

    Counted are inputs and outputs of matrix products; the float32 tensors that two norms per block keep; and, with "eager"
    attention, its softmax in float32 and, if that is lower, in the dtype of the products. An expert has its share of tokens.

    Args:
        layout: of the model.
        windows, length: number and tokens of the forward's windows.
        cast: dtype of autocast, if it is not that of the weights. The cast copies of weights count too. None: no autocast.
    """
    tokens, total, norms = windows * length, 0.0, 16.0 * layout.widest[0] * len(layout.blocks)
    dtype = cast or next(layout.projections()).parameter.dtype
    if getattr(layout.model.config, "_attn_implementation", None) == "eager":
        heads = sum(block.attention.heads for block in layout.blocks if block.attention is not None)
        total += heads * tokens * length * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
    for unit in (unit for block in layout.blocks for unit in block.units):
        numbers = sum(p.shape[0] for p in unit.projections)
        if isinstance(unit, Linears):
            numbers += unit.projections[0].shape[1]
        numbers += sum(network.first[0].shape[1] + network.roles["down"].shape[1] for network in unit.networks)
        share = unit.share if isinstance(unit, Experts) else 1.0
        copies = 0 if cast is None else sum(p.size for p in unit.projections)
        total += (numbers * share * tokens + copies) * dtype.itemsize
    return total + norms * tokens


def _positions(local: Tensor) -> Tensor:
    """Flat indices of a parameter's nonzero entries, (kept,) int32, or int64 where int32 is too small."""
    positions = local.reshape(-1).nonzero().squeeze(1)
    return positions.to(torch.int32 if local.numel() < 2**31 else torch.int64)


def _share_of_rate(step: int, steps: int) -> float:
    """The learning rate at a step, as a fraction of the largest one."""
    return min((step + 1) / max(WARM_UP * steps, 1), 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
