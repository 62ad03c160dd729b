"""Calibration windows: the first so many of a stream of batches, each rank its own share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

    @property
    def length(self) -> int:
        """Tokens of each window, padding too."""
        return next(iter(self.inputs.values())).shape[1]


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
    batch_tokens: int | None = None,
) -> tuple[list[CalibrationBatch], int]:
    """This rank's share of the first ``count`` windows (rows of batches), and how many there are over all ranks.

    Args:
        batches: batches that :func:`model_inputs` understands.
        count: windows over all ranks.
        ranks: window i goes to rank ``i mod size``, so shares differ by at most one and none is used twice.
        device: where to put them.
        sharded: the stream already holds this rank's windows only (a distributed sampler): take a share's worth.
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
    return taken, int(total)


def first_tokens(batches: Sequence[CalibrationBatch], tokens: int, length: int, ranks: Ranks) -> list[CalibrationBatch]:
    """A few tokens of as many windows as they allow, as one batch: of the first windows over all ranks, their first tokens.

    Padding in front is left out, as far as the window is long enough. All are as long as the longest allows; shorter windows
    are passed over.

    Args:
        batches: this rank's windows.
        tokens: how many, over all ranks, to rounding.
        length: at most so many of one window.
        ranks: window i is rank ``i mod size``'s. There is no communication.

    Returns:
        a batch, none of whose tokens count if these windows are all other ranks'; nothing for no windows.
    """
    length = min(length, max((batch.length for batch in batches), default=0))
    mine = len(range(ranks.rank, max(1, round(tokens / max(length, 1))), ranks.size))
    long_enough = [batch for batch in batches if batch.length >= length]
    alike = [batch for batch in long_enough if batch.inputs.keys() == long_enough[0].inputs.keys()]
    rows = [(batch, row) for batch in alike for row in range(batch.windows)][: max(mine, 1)]
    cut = [_cut(batch, row, length) for batch, row in rows]
    if not cut:
        return []
    inputs = {key: torch.cat([batch.inputs[key] for batch in cut]) for key in cut[0].inputs}
    valid = torch.cat([batch.valid for batch in cut if batch.valid is not None]) & (mine > 0)
    return [CalibrationBatch(inputs, valid)]


def _cut(batch: CalibrationBatch, row: int, length: int) -> CalibrationBatch:
    """So many columns of one row, from the first that counts on if there are enough of them."""
    counts = batch.valid[row] if batch.valid is not None else torch.ones(batch.length, dtype=torch.bool)
    start = min(int(counts.int().argmax()), batch.length - length)
    columns = slice(start, start + length)
    inputs = {}
    for key, value in batch.inputs.items():
        own = value[row : row + 1] if len(value) == batch.windows else value[:1]
        across = key == "attention_mask" and own.dim() == 4  # queries by keys
        inputs[key] = own[..., columns, columns] if across else own[:, columns]
    return CalibrationBatch(inputs, counts[None, columns].to(own.device))


def equally_many(batches: list[CalibrationBatch], ranks: Ranks, device: torch.device) -> list[CalibrationBatch]:
    """As many batches as the rank with most has, by batches of which no token counts."""
    most = max(int(number) for number in ranks.gather(torch.tensor([len(batches)], device=device)))
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    nothing = CalibrationBatch({"input_ids": ids}, torch.zeros_like(ids, dtype=torch.bool))
    return batches + [nothing] * (most - len(batches))


def add_written_windows(
    batches: list[CalibrationBatch],
    fitted: int,
    copies: int,
    write: Callable[[Tensor, list[str]], Tensor],
    ranks: Ranks,
    device: torch.device,
) -> tuple[list[CalibrationBatch], int, int]:
    """Put windows that the model writes behind those that are fitted, in front of those held out.

    Windows as long as the longest of all are rewritten, if none of their tokens is padding.

    Args:
        batches: this rank's windows.
        fitted: how many of them, the first, are fitted.
        copies: how many windows to write for each of these.
        write: given windows, (n, length), as many on every rank, and their names, which differ over all ranks and copies,
            windows of the same shape.
        ranks: all call this together.
        device: of the batches.

    Returns:
        this rank's windows; how many of them are fitted now; and how many were written, over all ranks.

    Raises:
        UserError: batches without token ids.
    """
    if any("input_ids" not in batch.inputs for batch in batches):
        raise UserError(
            "continuations are written after token ids, but calibration batches hold inputs_embeds. Set continuations to 0."
        )
    ahead, behind = _split(batches, fitted)
    whole = [
        ids
        for batch in ahead
        for row, ids in enumerate(batch.inputs["input_ids"])
        if batch.valid is None or bool(batch.valid[row].all())
    ]
    longest = max((len(ids) for ids in whole), default=0)
    longest = max(int(number) for number in ranks.gather(torch.tensor([longest], device=device)))
    whole = [ids for ids in whole if len(ids) == longest]
    counts = [int(number) for number in ranks.gather(torch.tensor([len(whole)], device=device))]
    if not sum(counts):
        return batches, fitted, 0
    # Ranks with fewer windows take part with others, and drop what comes of them.
    filler = [torch.zeros(longest, dtype=torch.long, device=device)] * (max(counts) - len(whole))
    windows = torch.stack([*whole, *filler]).repeat(copies, 1)
    names = [f"{ranks.rank + row * ranks.size}/{copy}" for copy in range(copies) for row in range(max(counts))]
    written = write(windows, names).view(copies, max(counts), longest)[:, : len(whole)].flatten(0, 1)
    more = [CalibrationBatch({"input_ids": ids}, None) for ids in written.split(ahead[0].windows)] if whole else []
    return [*ahead, *more, *behind], fitted + len(written), copies * sum(counts)


def _split(batches: list[CalibrationBatch], windows: int) -> tuple[list[CalibrationBatch], list[CalibrationBatch]]:
    """The first so many windows, and the others."""
    ahead: list[CalibrationBatch] = []
    behind: list[CalibrationBatch] = []
    for batch in batches:
        count = max(0, min(windows, batch.windows))
        windows -= count
        for rows, side in ((slice(count), ahead), (slice(count, None), behind)):
            inputs = {k: v[rows] if len(v) == batch.windows else v for k, v in batch.inputs.items()}
            if len(range(batch.windows)[rows]):
                side.append(CalibrationBatch(inputs, None if batch.valid is None else batch.valid[rows]))
    return ahead, behind


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
