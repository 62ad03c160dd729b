"""What is measured on the validation windows: perplexity, SparseGPT's for comparison, and how the model continues a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm_lightning.architecture import context_of, token_input
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.data import calibration_batches, datamodule_of, validation_batches
from sparsellm_lightning.distributed import adapter_for, local_tensor
from sparsellm_lightning.models import continued, first_prompts, labels_in, model_inputs, perplexity
from sparsellm_lightning.pipeline import prune_model
from sparsellm_lightning.reporting import PruningReport
from sparsellm_lightning.runtime import Profile, showing
from sparsellm_lightning.solvers import IGNORED

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
        """Perplexity on the validation windows.

        None if there are none, if the model has no language-model head, or, with a warning, if it is not finite.
        """
        batches, sharded = validation_batches(trainer)
        if batches is None or model.get_output_embeddings() is None:
            return None
        adapter = adapter_for(trainer)
        seen: list[tuple[int, int]] = []
        with self.profile.phase("evaluation"), showing(shows_progress(trainer)):
            found = perplexity(model, _noting_windows(batches, seen), adapter, sharded=sharded)
        (windows,) = adapter.ranks.total(sum(count for count, _ in seen))
        self.evaluation = {
            "source": str(getattr(datamodule_of(trainer), "evaluation_text", "validation dataloader")),
            "windows": windows if sharded else windows // adapter.ranks.size,
            "length": max((length for _, length in seen), default=0),
        }
        if not math.isfinite(found):  # a report cannot hold it
            rank_zero_warn(f"The perplexity on the validation windows is {found}, and is not reported.")
            return None
        return found

    def sparsegpt(
        self, trainer: pl.Trainer, model: PreTrainedModel, config: PruningConfig, resume_dir: Path | None = None
    ) -> float | None:
        """Perplexity of the model pruned by SparseGPT on the same windows. Its weights are dense again afterwards.

        Args:
            trainer, model: of the run. All ranks call this together.
            config: of the run. Pattern, sparsity, ignored projections and windows are taken from it.
            resume_dir: folder that keeps finished blocks, as in :func:`~sparsellm_lightning.prune_model`.
        """
        same = ("sparsity", "pattern", "ignore", "num_calibration_samples", "seed", "memory")
        baseline = PruningConfig(preset="paper", method="sparsegpt", **{name: getattr(config, name) for name in same})
        batches, sharded, _ = calibration_batches(trainer, config.num_calibration_samples, config.seed)
        weights = [local_tensor(parameter) for parameter in model.parameters()]
        dense = [weight.to("cpu", copy=True) for weight in weights]
        adapter, progress = adapter_for(trainer), shows_progress(trainer)
        try:
            with self.profile.phase("baseline"):
                prune_model(
                    model, batches, baseline, adapter=adapter, sharded=sharded, resume_dir=resume_dir, progress=progress
                )
            return self.perplexity(trainer, model)
        finally:
            for weight, before in zip(weights, dense, strict=True):
                weight.copy_(before)

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
            tokenizer: that turns tokens into text. None: there are no examples, as with a context that is too short.
            state: of the model, ``dense``, ``pruned`` or ``finetuned``.
            known: examples of other states, which get this one too.
        """
        batches, _ = validation_batches(trainer)
        if batches is None or model.get_output_embeddings() is None or PROMPTS[1] + CONTINUED > context_of(model):
            return []
        if self._prompts is None and tokenizer is not None:
            with isolate_rng():
                torch.manual_seed(0)  # a shuffled loader has the same order on all ranks
                self._prompts = first_prompts(batches, *PROMPTS)
        adapter = adapter_for(trainer)
        if not adapter.ranks.all(self._prompts is not None):  # a rank may lack the tokenizer's files
            return []
        assert tokenizer is not None
        assert self._prompts is not None
        with self.profile.phase("evaluation"):
            texts = tokenizer.batch_decode(continued(model, self._prompts, CONTINUED, adapter))
        prompts = tokenizer.batch_decode(self._prompts)
        if [example["prompt"] for example in known] != prompts:  # a resumed run may have other windows
            known = [{"prompt": prompt} for prompt in prompts]
        return [example | {state: text} for example, text in zip(known, texts, strict=True)]

    def comparable(self, report: PruningReport) -> dict[str, float | None]:
        """A report's perplexities. None instead, with a warning, if this run measures on another text."""
        before, now = report.evaluation, self.evaluation
        if now is None or before is None or now == before:
            return report.perplexity
        texts = ["{windows} windows of {length} tokens of {source}".format(**text) for text in (before, now)]
        rank_zero_warn(
            f"The model was measured on {texts[0]} before, and on {texts[1]} now. The report gives the new perplexity only."
        )
        return dict.fromkeys(report.perplexity)


def shows_progress(trainer: pl.Trainer) -> bool:
    """Whether this process shows progress bars."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def _noting_windows(batches: Iterable[Any], seen: list[tuple[int, int]]) -> Iterator[Any]:
    """The batches, of a shuffled loader in the same order on all ranks. ``seen`` gets their numbers of windows and lengths."""
    torch.manual_seed(0)  # the random state is restored after the measurement
    for batch in batches:
        yield batch  # its shapes are checked there
        windows, length = token_input(model_inputs(batch)).shape[:2]
        labels = labels_in(batch)
        if labels is not None:  # windows without any make up an even share of the ranks
            windows = int((labels != IGNORED).any(1).sum())
        seen.append((windows, length))
