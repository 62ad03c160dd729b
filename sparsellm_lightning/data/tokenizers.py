"""The tokenizer that belongs to the model of a run."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsellm_lightning.data.datamodule import TextDataModule
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import tokenizer_of


def run_tokenizer(data: Any, module: Any) -> PreTrainedTokenizerBase | None:
    """The module's tokenizer, or the datamodule's if the module has none. None if neither has one.

    Raises:
        UserError: the model lacks its tokenizer, and a :class:`TextDataModule` that has text has none, or the datamodule's is
            a name of none.
    """
    given = getattr(data, "tokenizer", None) is not None
    found: PreTrainedTokenizerBase | None = None
    try:
        found = tokenizer_of(module)
    except UserError as error:  # a model without its tokenizer
        if isinstance(data, TextDataModule) and (data.source != "self" or data.texts.files["test"]) and not given:
            raise  # there is text to tokenise
        if not given:  # the data are tokens already
            warnings.warn(f"The model goes without a tokenizer: {error}", stacklevel=2)
    if found is None and given:
        found = data._get_tokenizer() if isinstance(data, TextDataModule) else tokenizer_of(data)
    return found
