"""Masks that keep pruned weights at zero in training: of the local shard, one bit a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning.architecture import DecoderLayout, Projection, linear_projection, unwrapped_names
from sparsellm_lightning.distributed import StrategyAdapter, local_tensor
from sparsellm_lightning.errors import MaskError


class Masks:
    """The zeros of some weights, held through training.

    The masks are read from the weights' zeros when the object is made, so a resumed run rebuilds them from the weights alone. A
    kept weight never becomes zero: if an update gives 0, the weight gets the smallest normal number of its dtype instead. So
    the zeros always show which weights are pruned.

    Args:
        projections: weights whose zeros are held. Of a fused parameter all zeros are held.
        adapter: of the strategy the model runs under.

    Attributes:
        zeros: number of pruned weights by layer, over all ranks.
    """

    def __init__(self, projections: Sequence[Projection], adapter: StrategyAdapter) -> None:
        self.adapter = adapter
        self.projections = whole_parameters(projections)
        self._packed = [pack(local_tensor(p.parameter) == 0) for p in self.projections]
        self.zeros = count_zeros(self.projections, adapter)

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Zero the gradients of pruned weights. To be called when the pruned weights are zero: before the optimizer step.

        Args:
            parameters: whose gradients are masked. None: all that have masks.
        """
        for parameter in (p.parameter for p in self.projections) if parameters is None else parameters:
            if parameter.grad is not None:
                gradient = local_tensor(parameter.grad)
                # This kernel zeroes the gradient where |weight| ≤ 0, in one pass instead of a comparison and a fill.
                torch.ops.aten.hardshrink_backward.grad_input(
                    gradient, local_tensor(parameter), 0.0, grad_input=gradient
                )

    @torch.no_grad()
    def apply(self) -> None:
        """Set pruned weights to zero, and kept weights that became zero to the smallest normal number.

        Layers whose zeros agree with the mask are not written.
        """
        trained = [i for i, p in enumerate(self.projections) if p.parameter.requires_grad]
        if not trained:
            return
        # Compared entry by entry, because an optimizer may move a zero and leave their number as it was.
        moved = [
            (pack(weight == 0) != self._packed[i].to(weight.device)).any()
            for i in trained
            for weight in [local_tensor(self.projections[i].parameter)]
        ]
        for i in (i for i, differs in zip(trained, torch.stack(moved).tolist(), strict=True) if differs):
            weight, pruned = self._local(i)
            weight.masked_fill_(pruned, 0)
            weight.masked_fill_((weight == 0) ^ pruned, torch.finfo(weight.dtype).tiny)

    @torch.no_grad()
    def keep_nonzero(self) -> bool:
        """Set kept weights that are zero, as a mean of weights in 16 bits may be, to the smallest normal number.

        Returns:
            whether there were any on this rank.
        """
        found = False
        for i in range(len(self.projections)):
            weight, pruned = self._local(i)
            lost = (weight == 0) & ~pruned
            found = found or bool(lost.any())
            weight.masked_fill_(lost, torch.finfo(weight.dtype).tiny)
        return found

    @torch.no_grad()
    def clear_moments(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Zero the optimizers' state at pruned weights, in every state tensor of the weight's shape."""
        for optimizer in optimizers:
            for projection, packed in zip(self.projections, self._packed, strict=True):
                weight = projection.parameter
                for value in optimizer.state.get(weight, {}).values():
                    # A tensor of another shape, kind or dtype is quantised or factored. A DTensor's moments are DTensors.
                    alike = (
                        isinstance(value, Tensor) and value.shape == weight.shape and type(value) is type(weight.data)
                    )
                    if alike and value.is_floating_point():
                        moment = local_tensor(value)
                        moment.masked_fill_(unpack(packed, moment.shape).to(moment.device), 0)

    @torch.no_grad()
    def check(self) -> None:
        """Compare the zeros with the masks, entry for entry, on all ranks.

        Raises:
            MaskError: a pruned weight is not zero, or a kept one is. Names the layer and both counts.
        """
        wrong = [((weight == 0) ^ pruned).sum() for weight, pruned in map(self._local, range(len(self.projections)))]
        if not wrong:
            return
        total = torch.stack(wrong).to(self.adapter.ranks.device)
        self.adapter.ranks.sum_(total)
        if not bool(total.any()):
            return
        now = count_zeros(self.projections, self.adapter)
        index = int(total.nonzero()[0])
        name = self.projections[index].name
        size = self.projections[index].size
        raise MaskError(
            f"{name} must keep the {self.zeros[name]} zeros ({100 * self.zeros[name] / size:.4f} %) that pruning left, but has "
            f"{now[name]} ({100 * now[name] / size:.4f} %), {int(total[index])} of its weights differing in that. Something "
            "changes weights outside the optimizer: look for a callback or hook that writes parameters, and let it skip zeros."
        )

    def _local(self, index: int) -> tuple[Tensor, Tensor]:
        """A weight's local shard, and where it is pruned. The model may have moved since the masks were read."""
        weight = local_tensor(self.projections[index].parameter)
        return weight, unpack(self._packed[index].to(weight.device), weight.shape)


def count_zeros(layers: Sequence[Projection], adapter: StrategyAdapter) -> dict[str, int]:
    """Zeros of whole parameters by name, over all ranks, which call this together."""
    if not layers:
        return {}
    totals = torch.stack([(local_tensor(p.parameter) == 0).sum() for p in layers]).to(adapter.ranks.device)
    adapter.ranks.sum_(totals)
    if not adapter.weights_are_split:
        totals //= adapter.ranks.size
    return {p.name: int(total) for p, total in zip(layers, totals, strict=True)}


def left_out_biases(layout: DecoderLayout, adapter: StrategyAdapter) -> list[Projection]:
    """The biases of blocks whose projections are all zero, each as a matrix of one column. Their zeros are held too.

    Args:
        layout: the model's blocks.
        adapter: of the strategy the model runs under. All ranks call this together.
    """
    found: dict[int, Projection] = {}
    for block in layout.blocks:
        projections = [p for p in block.projections() if p.pruned]
        (zeros,) = adapter.ranks.total(sum(int(adapter.count_zeros(p)) for p in projections))
        for p in projections:
            if p.bias is not None and zeros == sum(q.size for q in projections):
                shape = (p.bias.numel(), 1)
                found[id(p.bias)] = Projection(f"{p.name}.{p.bias_name}", p.module, True, shape, p.bias_name)
    return list(found.values())


def whole_parameters(projections: Iterable[Projection]) -> list[Projection]:
    """One projection for each parameter that holds some of these, by rows of all its matrices."""
    by_parameter: dict[int, list[Projection]] = {}
    for p in projections:
        by_parameter.setdefault(id(p.parameter), []).append(p)
    return [
        same[0] if same[0].is_whole else _whole(same[0], sum(p.shape[0] for p in same))
        for same in by_parameter.values()
    ]


def _whole(part: Projection, rows: int) -> Projection:
    levels = 1 if part.expert is None else 2  # of the name that say which part it is
    holder = part.name.rsplit(".", levels)[0]
    name = holder if part.expert is None else f"{holder}.{part.parameter_name}"
    return Projection(name, part.module, part.pruned, (rows, part.shape[1]), part.parameter_name)


def linear_layers(module: nn.Module) -> list[Projection]:
    """The linear layers and experts of any model. Embeddings, heads tied to them and parts of adapters are passed over."""
    layers: list[Projection] = []
    seen: set[int] = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    seen |= {
        id(parameter)
        for child in module.modules()
        if hasattr(child, "base_layer")
        for name, parameter in child.named_parameters()
        if not name.startswith("base_layer.")
    }
    for child, name in unwrapped_names(module).items():
        if isinstance(child, (nn.Linear, Conv1D)) and id(child.weight) not in seen:
            seen.add(id(child.weight))
            layers.append(linear_projection(name, child))
        for key, parameter in child.named_parameters(recurse=False):
            if parameter.dim() == 3 and id(parameter) not in seen:
                seen.add(id(parameter))
                experts, rows, columns = parameter.shape
                layers.append(Projection(f"{name}.{key}", child, True, (experts * rows, columns), key))
    return layers


SPARSE = 0.01  # smallest share of zeros of a layer that counts as sparse
MANY_ZEROS = 0.2  # share of zeros from which a layer counts as pruned. Some 4-bit files of dense models have 0.1


def zero_shares(layers: Sequence[Projection], adapter: StrategyAdapter) -> dict[str, float]:
    """The fraction of zeros in each layer's weight, by name, over all ranks."""
    whole = whole_parameters(layers)
    zeros = count_zeros(whole, adapter)
    return {p.name: zeros[p.name] / max(p.size, 1) for p in whole}


def pruned_before(projections: Sequence[Projection], adapter: StrategyAdapter) -> list[Projection]:
    """The parameters with :data:`MANY_ZEROS`, but not zeros only. All ranks call this together."""
    layers = whole_parameters(projections)
    shares = zero_shares(layers, adapter)
    return [p for p in layers if MANY_ZEROS <= shares[p.name] < 1]


def sparse_layers(layers: Sequence[Projection], shares: dict[str, float], adapter: StrategyAdapter) -> list[Projection]:
    """The layers whose zeros are to be kept in training.

    Left out: layers that are all zeros, which are fresh and must train; and layers whose few zeros are whole rows, such as a
    head's rows of tokens that were never trained.

    Args:
        layers: of a model.
        shares: of their zeros, see :func:`zero_shares`.
        adapter: of the strategy the model runs under. All ranks call this together.
    """
    some = [p for p in layers if 0 < shares[p.name] < 1]
    return [p for p in some if shares[p.name] >= SPARSE or not _are_rows(p, adapter)]


def _are_rows(p: Projection, adapter: StrategyAdapter) -> bool:
    zeros = local_tensor(p.parameter) == 0  # of FSDP1 a flat piece, which does not show rows
    return adapter.ranks.all(zeros.dim() == 2 and bool((zeros == zeros.all(1, keepdim=True)).all()))


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits, ``(ceil(n / 8),)`` uint8, first entry lowest."""
    flat = mask.flatten()
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    # Eight bytes of 0 or 1 as one integer; byte k times 2^(56 - 7k) lands on bit 56 + k, and nothing else lands there.
    return ((eights * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The bool tensor that :func:`pack` was given."""
    places = torch.bitwise_left_shift(packed.new_ones(8), torch.arange(8, dtype=torch.uint8, device=packed.device))
    return (packed[:, None] & places).to(torch.bool).flatten()[: shape.numel()].view(shape)
