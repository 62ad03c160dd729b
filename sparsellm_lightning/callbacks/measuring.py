"""What is measured on the validation windows before and after pruning: perplexity, and how the model continues a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.data import validation_batches
from sparsellm_lightning.distributed import adapter_for
from sparsellm_lightning.models import continued, first_prompts, model_inputs, perplexity
from sparsellm_lightning.runtime import Profile, showing

PROMPTS = (3, 16)  # examples, and tokens of each
CONTINUED = 24  # tokens that follow


class Measurer:
    """Measures a run's model.

    Args:
        profile: that gets the seconds.

    Attributes:
        evaluation: the report's ``evaluation`` of the last perplexity. None before.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.evaluation: dict[str, Any] | None = None
        self._prompts: Tensor | None = None

    def perplexity(self, trainer: pl.Trainer, model: PreTrainedModel) -> float | None:
        """Perplexity on the validation windows. None if there are none, or the model has no language-model head."""
        batches, sharded = validation_batches(trainer)
        if batches is None or model.get_output_embeddings() is None:
            return None
        adapter = adapter_for(trainer)
        seen: list[torch.Size] = []
        with self.profile.phase("evaluation"), showing(shows_progress(trainer)):
            found = perplexity(model, _noting_shapes(batches, seen), adapter, sharded=sharded)
        (windows,) = adapter.ranks.total(sum(shape[0] for shape in seen))
        self.evaluation = {
            "source": str(getattr(trainer.datamodule, "evaluation_text", "validation dataloader")),  # type: ignore[attr-defined]
            "windows": windows if sharded else windows // adapter.ranks.size,
            "length": max((shape[1] for shape in seen), default=0),
        }
        return found

    def examples(
        self,
        trainer: pl.Trainer,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        state: str,
        known: Sequence[dict[str, str]] = (),
    ) -> list[dict[str, str]]:
        """Beginnings of validation windows, and how the model goes on.

        Args:
            trainer, model: of the run. All ranks call this together.
            tokenizer: that turns tokens into text. None: there are no examples.
            state: of the model, ``dense``, ``pruned`` or ``finetuned``.
            known: examples of other states, which get this one too.
        """
        batches, _ = validation_batches(trainer)
        if tokenizer is None or batches is None or model.get_output_embeddings() is None:
            return []
        if self._prompts is None:
            self._prompts = first_prompts(batches, *PROMPTS)
        adapter = adapter_for(trainer)
        if adapter.ranks.total(int(self._prompts is None)) != [0]:
            return []
        assert self._prompts is not None
        with self.profile.phase("evaluation"):
            texts = tokenizer.batch_decode(continued(model, self._prompts, CONTINUED, adapter))
        examples = known or [{"prompt": prompt} for prompt in tokenizer.batch_decode(self._prompts)]
        return [example | {state: text} for example, text in zip(examples, texts, strict=True)]


def shows_progress(trainer: pl.Trainer) -> bool:
    """Whether this process shows progress bars."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _noting_shapes(batches: Iterable[Any], seen: list[torch.Size]) -> Iterator[Any]:
    """The batches. The shapes of their windows are added to ``seen``."""
    for batch in batches:
        seen.append(next(iter(model_inputs(batch).values())).shape)
        yield batch
