"""What pruning needs from a Trainer's strategy, behind one interface, and the adapter of a single device.

Every adapter splits the rows of a weight over the data-parallel ranks in the same way. A plain parameter is whole on every rank
(single device, DDP), a ``DTensor`` is sharded by rows (FSDP2). Solvers see this rank's rows in either case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from sparsellm_lightning.architecture import (
    DecoderLayout,
    Projection,
    describe,
    device_of,
    evaluating,
    run_base,
    token_input,
    without_cache,
)
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.runtime import fastest_float32, keeping_freed_memory
from sparsellm_lightning.solvers import SINGLE, Ranks


def copied(matrix: Tensor) -> Tensor:
    """A contiguous copy in float32."""
    return matrix.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class StrategyAdapter:
    """Every rank has the whole model. The adapters of strategies that split it derive from this one.

    Args:
        strategy: of the Trainer. None: no Trainer, no autocast.
        ranks: that have a part of the calibration windows each. Each solves its rows of every weight.
    """

    # Whether a forward is a collective. Then all ranks must make the same number of forwards.
    forward_is_collective = False
    # Whether each rank holds a piece of every parameter, instead of the whole.
    weights_are_split = False

    def __init__(self, strategy: Strategy | None = None, ranks: Ranks = SINGLE) -> None:
        self.strategy = strategy
        self.ranks = ranks

    def check(self, layout: DecoderLayout) -> None:
        """Refuse a model that is laid out over ranks in a way that is not supported."""

    def check_visible(self) -> None:
        """Refuse a model of which the strategy hides weights that are pruned, or whose zeros are kept."""

    def describe(self, model: PreTrainedModel, config: PruningConfig | None = None) -> DecoderLayout:
        """The model's structure, probed by forwards that the strategy allows. All ranks call this together."""
        with fastest_float32(device_of(model)):  # the probe compares results
            layout = describe(model, config, self.run_model)
        self.finish(model)  # the probe's forward may have left parameters gathered
        return layout

    @contextmanager
    def calibrating(self, model: nn.Module) -> Iterator[None]:
        """Context of calibration: evaluation mode, eager compiled modules, the fastest exact float32 products, memory kept.

        Training modes and the random state are restored at the end.
        """
        random_state = isolate_rng()
        random_state.__enter__()
        try:
            with evaluating(model), fastest_float32(device_of(model)), keeping_freed_memory():
                yield
        finally:
            random_state.__exit__(None, None, None)  # as a with statement, it restores nothing after an exception

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context of the calibration forward, such as autocast."""
        return nullcontext() if self.strategy is None else self.strategy.precision_plugin.forward_context()

    def holding(self, block: nn.Module) -> AbstractContextManager[Any]:
        """Context of several forwards of a block, between which no weight changes."""
        return nullcontext()

    def inner(self, block: nn.Module) -> nn.Module:
        """The module inside the strategy's wrapper of a block: its forward may end early, the wrapper's may not."""
        return block

    def with_gradient(self, forward: Callable[[], Tensor]) -> Tensor:
        """Call a forward of a block, whose result has a gradient that is taken."""
        return forward()

    def tuning(self, modules: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """Context of backwards through some modules, of which ranks may use different parameters (experts)."""
        return nullcontext()

    def run_model(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        """Run the model so that its blocks are called. The head is left out where the strategy allows it."""
        run_base(model, inputs)

    def logits(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor | None:
        """Logits of this rank's part of an evaluation batch. None if the rank has no part of it."""
        given = token_input(inputs)
        if not len(given) and not self.forward_is_collective:
            return None
        part = inputs if len(given) else {"input_ids": given.new_zeros(1, 2, dtype=torch.long)}
        with self.forward_context():
            logits: Tensor = self._through_root(lambda: model(**part, **without_cache(model))).logits
        return logits if len(given) else None

    def next_logits(self, model: PreTrainedModel, ids: Tensor, cache: Cache | None) -> Tensor:
        """Logits of the token after ``ids``, (batch, vocabulary).

        Args:
            model: with a language-model head.
            ids: (batch, new) tokens that are not in the cache.
            cache: keys and values of the tokens before. Those of ``ids`` are added in place. None: ``ids`` are all tokens.
        """
        # transformers 5.20 calls this argument past_key_values, later versions also cache, and from 5.40 on only so.
        known = inspect.signature(model.forward).parameters
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["cache" if "cache" in known else "past_key_values"] = cache
        if "logits_to_keep" in known:
            options["logits_to_keep"] = 1
        with self.forward_context():
            logits: Tensor = self._through_root(lambda: model(input_ids=ids, **options)).logits
        return logits[:, -1]

    def _through_root(self, call: Callable[[], Any]) -> Any:
        """Call a function inside a forward of the root module, if the strategy needs that."""
        return call()

    def read_rows(self, projection: Projection) -> Tensor:
        """A copy of this rank's rows of a weight, (rows, in features) float32."""
        rows = self.ranks.local_rows(projection.shape[0])
        return copied(projection.matrix[rows])

    def write_rows(self, projection: Projection, rows: Tensor) -> None:
        """Write this rank's rows into the parameter, in place, cast to its dtype. All ranks call this together."""
        rows = rows.to(projection.parameter.dtype)
        self.write_whole(projection, self.ranks.gather_rows(rows, projection.shape[0]))

    def whole(self, projection: Projection) -> Tensor:
        """The whole weight as float32, on every rank. To be held for one block at a time."""
        return copied(projection.matrix)

    def write_whole(self, projection: Projection, weight: Tensor) -> None:
        """Write a weight, whole on every rank, into the parameter, in place, cast to its dtype."""
        projection.matrix.copy_(weight)

    def whole_bias(self, projection: Projection) -> Tensor | None:
        """The whole bias as float32, or None."""
        if projection.bias is None:
            return None
        return projection.bias_of(projection.bias.detach()).to(torch.float32, copy=True)

    def count_zeros(self, projection: Projection) -> Tensor:
        """Zeros in this rank's part of the weight. Summed over ranks, every entry is counted once."""
        return (self.read_rows(projection) == 0).sum()

    def state_dict(self, model: PreTrainedModel) -> dict[str, Tensor] | None:
        """The model's whole state on rank 0. None where ``model.state_dict()`` is whole."""
        return None

    def finish(self, model: nn.Module) -> None:
        """Restore the state that the strategy expects for training and checkpoints."""


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, sharing its memory. The whole of a parameter that is not distributed."""
    data = parameter.detach()
    to_local = getattr(data, "to_local", None)
    return data if to_local is None else to_local()
