"""Work that the first rank does alone, such as writing files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import lightning.pytorch as pl
import torch.distributed as dist

from sparsellm_lightning.errors import UserError

_CONTEXTS = itertools.count()  # equal on all ranks, which enter the same contexts in the same order
_LONGEST = timedelta(days=30)


@contextmanager
def failing_with_first(trainer: pl.Trainer) -> Iterator[None]:
    """Where the first rank fails inside, all ranks fail, with its message. They wait for it at the end, as long as it takes.

    They wait at the process group's store. A collective would end them after the group's timeout, in Lightning 30 minutes,
    which writing or uploading a large model can take.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
        key = f"sparsellm_lightning/first/{next(_CONTEXTS)}"
        if trainer.is_global_zero:
            store.set(key, "")
        else:
            store.wait([key], _LONGEST)
    kind, message = trainer.strategy.broadcast((isinstance(failure, UserError), failure and str(failure)))
    if failure is None and message is not None:  # on the first rank
        failure = UserError(message) if kind else RuntimeError(message)
    if failure is not None:
        raise failure
