"""Text and tokens: sources, the datamodule, calibration windows, and windows that the model writes."""

from sparsellm_lightning.data.datamodule import TextDataModule
from sparsellm_lightning.data.loaders import calibration_batches, datamodule_of, validation_batches
from sparsellm_lightning.data.synthetic import generate_windows, rewrite_windows
from sparsellm_lightning.data.tokenizers import run_tokenizer
from sparsellm_lightning.data.windows import (
    CalibrationBatch,
    equally_many,
    first_tokens,
    fitted_windows,
    held_out_windows,
    regrouped,
    split_windows,
    take_windows,
    written_windows,
)

__all__ = [
    "CalibrationBatch",
    "TextDataModule",
    "calibration_batches",
    "datamodule_of",
    "equally_many",
    "first_tokens",
    "fitted_windows",
    "generate_windows",
    "held_out_windows",
    "regrouped",
    "rewrite_windows",
    "run_tokenizer",
    "split_windows",
    "take_windows",
    "validation_batches",
    "written_windows",
]
