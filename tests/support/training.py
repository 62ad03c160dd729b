"""A Trainer without output, small LightningModules, and masks that the tests make and watch themselves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm_lightning import SparseLLMCallback, verify_export
from support.models import VOCABULARY

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def trainer(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, "callbacks": list(callbacks), **kwargs})


class OwnModule(pl.LightningModule):
    """A user's module: the attribute with the model is not ``model``, and batches are plain token ids."""

    def __init__(self, model: PreTrainedModel, **others: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = model
        for name, other in others.items():
            setattr(self, name, other)
        self.batches_seen = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.batches_seen += 1
        return self.backbone(batch, labels=batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def exported_smaller(
    model: PreTrainedModel, folder: Path, finetune: bool, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune a model in a Trainer and export it: the smaller model from the files, and the report.

    Checks that it gives the pruned model's logits, agrees with its report, and holds no zeros that count.
    """
    pruner = SparseLLMCallback(**settings, finetune=finetune, export_dir=str(folder), measure=False)
    ids = torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(pruner, max_steps=3).fit(OwnModule(model), DataLoader(ids, batch_size=4))  # type: ignore[arg-type]
    smaller = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert verify_export(folder) == []
    report = json.loads((folder / "pruning_report.json").read_text())
    assert report["sparsity"]["exported"] == 0
    return smaller, report


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of every linear layer but the head."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not name.endswith(("lm_head", "score"))
    }


def prune_by_hand(model: nn.Module, pattern: str = "random", seed: int = 0) -> None:
    """Random masks.

    Args:
        model: any module.
        pattern: ``random`` prunes 60 % of each layer, ``2:4`` prunes two of every four consecutive inputs.
        seed: of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    conv = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    with torch.no_grad():
        for weight in linear_weights(model).values():
            stored = weight.T if id(weight) in conv else weight  # (out, in)
            scores = torch.rand(stored.shape, generator=generator)
            if pattern == "random":
                stored.masked_fill_(scores < 0.6, 0)
            else:
                groups = scores.view(len(scores), -1, 4)
                stored.masked_fill_((groups <= groups.sort(-1).values[..., 1:2]).view_as(scores), 0)


class ZeroWatch(pl.Callback):
    """Compares the zeros with those at the first batch, in every hook of training that runs between steps.

    Attributes:
        start: the weights at the first batch.
        looks: number of comparisons.
        steps: optimizer steps at the last comparison.
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.looks = 0
        self.steps = 0

    def look(self, module: nn.Module) -> None:
        for name, weight in linear_weights(module).items():
            expected = self.start[name] == 0
            assert torch.equal(weight.detach() == 0, expected), f"{name}, look {self.looks}"
        self.looks += 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not self.start:
            self.start = {name: weight.detach().clone() for name, weight in linear_weights(pl_module).items()}
            assert self.start
        self.look(pl_module)

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.look(pl_module)  # inside the optimizer step's closure, so directly after the step before

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.look(pl_module)
        self.steps = trainer.global_step

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.start:
            self.look(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(pl_module)

    def moved(self, module: nn.Module) -> float:
        """The fraction of kept weights that differ from the first batch, in the layer where it is smallest."""
        return min(
            float((weight.detach() != self.start[name])[self.start[name] != 0].float().mean())
            for name, weight in linear_weights(module).items()
        )

    def sparsity(self) -> float:
        return sum(int((w == 0).sum()) for w in self.start.values()) / sum(w.numel() for w in self.start.values())

    def moments(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
        """The optimizer's moments of pruned and of kept weights, one pair for each moment of each layer."""
        found = []
        for name, weight in linear_weights(module).items():
            for value in optimizer.state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    pruned = self.start[name] == 0
                    found.append((value[pruned], value[~pruned]))
        return found


class Module(OwnModule):
    """A user's module with a given optimizer."""

    def __init__(self, model: PreTrainedModel, optimizer: MakeOptimizer) -> None:
        super().__init__(model)
        self.make_optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())
