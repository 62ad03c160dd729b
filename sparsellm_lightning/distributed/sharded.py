"""What FSDP1 and FSDP2 have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import patched_forward, token_input, without_cache
from sparsellm_lightning.distributed.adapter import StrategyAdapter


class ShardedAdapter(StrategyAdapter):
    """Every forward gathers parameters, and must go through the root module."""

    forward_is_collective = True
    weights_are_split = True

    def run_model(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        # The root's forward gathers its own parameters, so the head cannot be left out, only cut to one position. Where blocks
        # share keys and values (Gemma 4), a number would cut their hidden states too, which indices do not.
        first = torch.zeros(1, dtype=torch.long, device=token_input(inputs).device)
        one = {"logits_to_keep": first} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._through_root(lambda: model(**inputs, **one, **without_cache(model)))

    def _through_root(self, call: Callable[[], Any]) -> Any:
        """Call a function inside the forward of the outermost wrapped module, whose hooks gather its parameters."""
        assert self.strategy is not None
        module = self.strategy.lightning_module
        outer = self.strategy.model
        if not isinstance(outer, (FSDPModule, FullyShardedDataParallel)):
            return call()
        assert module is not None
        with patched_forward(module, call):
            return outer()
