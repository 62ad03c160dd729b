"""What the walker needs from the Trainer's strategy, behind one interface: one small adapter per strategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsellm_lightning.architectures import Projection
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.ranks import SINGLE, Ranks


class StrategyAdapter:
    """A single device: every weight is whole and in place. The other adapters override what differs."""

    def __init__(self, strategy: Strategy | None = None) -> None:
        self.strategy = strategy
        self.ranks: Ranks = SINGLE

    weights_are_sharded = False

    @contextmanager
    def calibrating(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode, compiled modules run eagerly; modes and the random state are put back at the end.

        Hooks inside a compiled block would silently not fire, hence the stance.
        """
        modes = {module: module.training for module in model.modules()}
        stance = getattr(torch.compiler, "set_stance", None)
        model.eval()
        try:
            with isolate_rng(), stance("force_eager") if stance else nullcontext():
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context of the calibration forward, such as autocast."""
        return nullcontext() if self.strategy is None else self.strategy.precision_plugin.forward_context()

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

    def local_weight(self, projection: Projection) -> Tensor:
        """What this rank holds of a weight, as stored; the whole of it unless ``weights_are_sharded``."""
        return projection.parameter.detach()

    def read_rows(self, projection: Projection) -> Tensor:
        """This rank's rows of a weight as (rows, in features) float32: a copy."""
        weight = projection.parameter.detach()
        return (weight.T if projection.transposed else weight).to(torch.float32, copy=True).contiguous()

    def write_rows(self, projection: Projection, rows: Tensor) -> None:
        """Put this rank's rows back, in place, cast to the parameter's dtype."""
        with torch.no_grad():
            projection.parameter.copy_(rows.T if projection.transposed else rows)

    def whole(self, projection: Projection) -> Tensor:
        """The whole weight as float32, on every rank; never called for more than one block's weights at a time."""
        return self.ranks.gather_rows(self.read_rows(projection), projection.shape[0])

    def whole_bias(self, projection: Projection) -> Tensor | None:
        """The whole bias as float32, or None."""
        return None if projection.bias is None else projection.bias.detach().float()


_ADAPTERS: dict[type[Strategy], type[StrategyAdapter]] = {SingleDeviceStrategy: StrategyAdapter}


def adapter_for(trainer: pl.Trainer) -> StrategyAdapter:
    """The adapter of the Trainer's strategy.

    Raises:
        UserError: the strategy is not supported.
    """
    adapter = _ADAPTERS.get(type(trainer.strategy))
    if adapter is None:
        raise UserError(
            f"Pruning supports the strategies {', '.join(s.__name__ for s in _ADAPTERS)}, "
            f"got {type(trainer.strategy).__name__}. Choose one of these with Trainer(strategy=...)."
        )
    return adapter(trainer.strategy)
