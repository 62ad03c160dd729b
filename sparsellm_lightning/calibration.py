"""Calibration windows: the first so many of a stream of batches, each rank its own share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.ranks import Ranks

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch of calibration windows.

    Args:
        inputs: the model's keyword arguments.
        valid: (batch, sequence) bool, False where a token must not count (padding); None if all count.
    """

    inputs: dict[str, Tensor]
    valid: Tensor | None

    @property
    def windows(self) -> int:
        return len(next(iter(self.inputs.values())))


def model_inputs(batch: Any) -> dict[str, Tensor]:
    """The model's keyword arguments in a batch: a dict, a tensor of token ids, or a sequence led by one.

    Raises:
        UserError: anything else.
    """
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if hasattr(batch, "items"):
        inputs = {key: value for key, value in batch.items() if key in _MODEL_INPUTS and isinstance(value, Tensor)}
        if "input_ids" in inputs or "inputs_embeds" in inputs:
            return inputs
    keys = f" with keys {', '.join(map(str, batch))}" if isinstance(batch, dict) else ""
    raise UserError(
        f"A calibration batch must be token ids or a dict with 'input_ids', got {type(batch).__name__}{keys}. "
        "Have the calibration dataloader give such batches."
    )


def take_windows(
    batches: Iterable[Any],
    count: int,
    ranks: Ranks,
    device: torch.device,
    *,
    sharded: bool = False,
    equal_numbers: bool = False,
    batch_tokens: int | None = None,
) -> tuple[list[CalibrationBatch], int]:
    """This rank's share of the first ``count`` windows (rows of batches), and how many there are over all ranks.

    Args:
        batches: batches that :func:`model_inputs` understands.
        count: windows over all ranks.
        ranks: window i goes to rank ``i mod size``, so shares differ by at most one and none is used twice.
        device: where to put them.
        sharded: the stream already holds this rank's windows only (a distributed sampler): take a share's worth.
        equal_numbers: give every rank as many batches as the one with most, by batches of which no token counts.
        batch_tokens: batches of more tokens are split, down to single windows.

    Raises:
        UserError: no windows on any rank.
    """
    rank, size = (0, 1) if sharded else (ranks.rank, ranks.size)
    wanted = count // ranks.size + (ranks.rank < count % ranks.size) if sharded else count
    taken, seen = [], 0
    for batch in batches if wanted else ():
        inputs = model_inputs(batch)
        rows = len(next(iter(inputs.values())))
        mine = [row for row in range(min(rows, wanted - seen)) if (seen + row) % size == rank]
        step = rows if batch_tokens is None else max(1, batch_tokens // next(iter(inputs.values())).shape[1])
        for part in (mine[start : start + step] for start in range(0, len(mine), step)):
            # Arguments shared by the batch (such as position ids of one row) are passed on as they are.
            chosen = {k: (v[part] if len(v) == rows else v).to(device) for k, v in inputs.items()}
            taken.append(CalibrationBatch(chosen, _valid(chosen.get("attention_mask"))))
        seen += rows
        if seen >= wanted:
            break
    total = torch.tensor([sum(batch.windows for batch in taken)], device=device)
    ranks.sum_(total)
    if not int(total):
        raise UserError(
            "Pruning needs at least one calibration window, the calibration (or training) dataloader gave none. "
            "Check its dataset and length."
        )
    if equal_numbers:
        most = max(int(number) for number in ranks.gather(torch.tensor([len(taken)], device=device)))
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        taken += [CalibrationBatch({"input_ids": ids}, torch.zeros_like(ids, dtype=torch.bool))] * (most - len(taken))
    return taken, int(total)


def held_out_windows(windows: int, share: float) -> int:
    """How many of so many windows are held out: a share of them, rounded down."""
    return int(share * windows)


def fitted_windows(windows: int, held_out: float, ranks: Ranks) -> int:
    """How many of this rank's windows are fitted: the first ones. The last of all windows are held out, on whichever rank.

    Args:
        windows: over all ranks.
        held_out: share of them to hold out.
        ranks: window i is rank ``i mod size``'s.
    """
    return len(range(ranks.rank, windows - held_out_windows(windows, held_out), ranks.size))


def _valid(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if mask is not None and mask.dim() == 2 and not bool(mask.all()) else None
