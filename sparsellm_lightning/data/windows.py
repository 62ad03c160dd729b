"""Which tokens calibrate: windows of a stream of batches, each rank's share, and which of them are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.architecture import token_input
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.models import model_inputs
from sparsellm_lightning.solvers import Ranks


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch of calibration windows.

    Args:
        inputs: the model's keyword arguments.
        valid: (batch, sequence) bool, False where a token does not count (padding). None: all count.
    """

    inputs: dict[str, Tensor]
    valid: Tensor | None

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(token_input(self.inputs))

    @property
    def length(self) -> int:
        """Tokens of each window, padding included."""
        return token_input(self.inputs).shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return self.windows * self.length if self.valid is None else int(self.valid.sum())

    def counts(self) -> Tensor:
        """Whether each token counts, (batch, sequence) bool."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.windows, self.length, dtype=torch.bool, device=next(iter(self.inputs.values())).device)

    def rows(self, chosen: slice | Sequence[int]) -> CalibrationBatch:
        """The chosen windows. Arguments that the batch shares (such as position ids of one row) stay as they are."""
        inputs = {k: v[chosen] if len(v) == self.windows else v for k, v in self.inputs.items()}
        return CalibrationBatch(inputs, None if self.valid is None else self.valid[chosen])


def take_windows(
    batches: Iterable[Any],
    count: int,
    ranks: Ranks,
    device: torch.device,
    *,
    sharded: bool = False,
    batch_tokens: int | None = None,
) -> tuple[list[CalibrationBatch], int]:
    """This rank's share of the first ``count`` windows (rows of batches), and the number of windows over all ranks.

    Rows in which no token counts, such as padded empty lines, are passed over.

    Args:
        batches: batches that :func:`~sparsellm_lightning.models.model_inputs` accepts.
        count: windows over all ranks.
        ranks: window i goes to rank ``i mod size``, so shares differ by at most one and no window is used twice.
        device: where the windows are put.
        sharded: whether the batches hold this rank's windows only (a distributed sampler).
        batch_tokens: upper limit on the tokens of a returned batch (at least one window). None: the batches stay as they are.

    Raises:
        UserError: no windows on any rank.
    """
    rank, size = (0, 1) if sharded else (ranks.rank, ranks.size)
    wanted = len(range(ranks.rank, count, ranks.size)) if sharded else count
    taken, seen, empty = [], 0, 0
    for batch in batches if wanted else ():
        whole = CalibrationBatch(model_inputs(batch), None)
        rows = _rows_that_count(whole)
        empty += whole.windows - len(rows)
        rows = rows[: wanted - seen]
        mine = [row for number, row in enumerate(rows, seen) if number % size == rank]
        if mine:
            chosen = {key: value.to(device) for key, value in whole.rows(mine).inputs.items()}
            taken.append(CalibrationBatch(chosen, _valid(chosen.get("attention_mask"))))
        seen += len(rows)
        if seen >= wanted or (not seen and empty >= 100 * wanted):  # a wrong mask on a stream without end
            break
    (total,) = ranks.total(sum(batch.windows for batch in taken))
    if not total:
        raise UserError(
            "Pruning needs at least one calibration window in which a token counts, but the calibration (or training) "
            "dataloader gave none. Check its dataset, its length and its attention masks (1 for tokens, 0 for padding)."
        )
    return taken if batch_tokens is None else regrouped(taken, batch_tokens), total


def regrouped(batches: Sequence[CalibrationBatch], tokens: int) -> list[CalibrationBatch]:
    """The windows in batches of at most ``tokens`` tokens, or of one window. Consecutive windows of equal shapes share one."""
    groups: list[list[CalibrationBatch]] = []
    shapes: list[object] = []
    for window in (batch.rows([row]) for batch in batches for row in range(batch.windows)):
        shape = {key: value.shape for key, value in window.inputs.items()}
        if groups and shape == shapes[-1] and (len(groups[-1]) + 1) * window.length <= tokens:
            groups[-1].append(window)
        else:
            groups.append([window])
            shapes.append(shape)
    made = []
    for group in groups:
        inputs = {key: torch.cat([window.inputs[key] for window in group]) for key in group[0].inputs}
        padded = any(window.valid is not None for window in group)
        made.append(CalibrationBatch(inputs, torch.cat([w.counts() for w in group]) if padded else None))
    return made


def held_out_windows(windows: int, fraction: float) -> int:
    """Number of windows that are held out: the fraction of ``windows``, rounded down."""
    return int(fraction * windows)


def fitted_windows(windows: int, fraction: float, ranks: Ranks) -> int:
    """Number of this rank's windows that are fitted: its first ones. The last of all windows are held out.

    The ranks take turns: the first windows of all ranks, the second ones, and so on.

    Args:
        windows: of this rank.
        fraction: of all windows that is held out.
        ranks: all call this together.
    """
    counts = [count for (count,) in ranks.gather_counts(windows)]
    order = sorted((position, rank) for rank, count in enumerate(counts) for position in range(count))
    fitted = order[: len(order) - held_out_windows(len(order), fraction)]
    return sum(rank == ranks.rank for _, rank in fitted)


def first_tokens(batches: Sequence[CalibrationBatch], tokens: int, length: int, ranks: Ranks) -> list[CalibrationBatch]:
    """One batch of the first ``length`` tokens of the first windows, with ``tokens`` tokens over all ranks.

    Padding at the start of a window is left out if the window is long enough. Windows shorter than both ``length`` and the
    longest window are passed over.

    Args:
        batches: this rank's windows.
        tokens: over all ranks, rounded to whole windows.
        length: upper limit of the tokens of one window.
        ranks: window i belongs to rank ``i mod size``. There is no communication.

    Returns:
        one batch, or none if the rank has no windows. If the chosen windows all belong to other ranks, no token of the batch
        counts.
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
    valid = torch.cat([batch.counts() for batch in cut]) & (mine > 0)
    return [CalibrationBatch(inputs, valid)]


def equally_many(batches: list[CalibrationBatch], ranks: Ranks, device: torch.device) -> list[CalibrationBatch]:
    """The batches, and after them batches in which no token counts, until this rank has as many as the rank with the most."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    nothing = CalibrationBatch({"input_ids": ids}, torch.zeros_like(ids, dtype=torch.bool))
    return batches + [nothing] * (ranks.largest(len(batches)) - len(batches))


def written_windows(
    batches: Sequence[CalibrationBatch],
    copies: int,
    write: Callable[[Tensor, list[str], int], Tensor],
    ranks: Ranks,
    device: torch.device,
) -> tuple[list[CalibrationBatch], int]:
    """Windows that the model writes, for every window that has no padding and is as long as the longest one of all ranks.

    Args:
        batches: this rank's windows.
        copies: number of windows to write for each such window.
        write: called for each copy with windows (n, length), equally many on every rank, their names, which are unique over
            ranks and copies, and the number of the copy. Returns windows of the same shape.
        ranks: all call this function together.
        device: of the batches.

    Returns:
        this rank's written windows, and their number over all ranks.

    Raises:
        UserError: batches without token ids.
    """
    if any("input_ids" not in batch.inputs for batch in batches):
        raise UserError(
            "continuations are written after token ids, but the calibration batches hold inputs_embeds. Set continuations to 0."
        )
    whole = [
        ids
        for batch in batches
        for row, ids in enumerate(batch.inputs["input_ids"])
        if batch.valid is None or bool(batch.valid[row].all())
    ]
    longest = ranks.largest(max((len(ids) for ids in whole), default=0))
    whole = [ids for ids in whole if len(ids) == longest]
    counts = [count for (count,) in ranks.gather_counts(len(whole))]
    if not sum(counts):
        return [], 0
    # Ranks with fewer windows write after zeros too, and drop the result.
    filler = [torch.zeros(longest, dtype=torch.long, device=device)] * (max(counts) - len(whole))
    windows, numbers = torch.stack([*whole, *filler]), range(ranks.rank, max(counts) * ranks.size, ranks.size)
    copied = [write(windows, [f"{number}/{copy}" for number in numbers], copy) for copy in range(copies)]
    written = torch.cat([copy[: len(whole)] for copy in copied])
    return [CalibrationBatch({"input_ids": ids[None]}, None) for ids in written], copies * sum(counts)


def split_windows(
    batches: Sequence[CalibrationBatch], windows: int
) -> tuple[list[CalibrationBatch], list[CalibrationBatch]]:
    """The first ``windows`` windows, and the others."""
    ahead: list[CalibrationBatch] = []
    behind: list[CalibrationBatch] = []
    for batch in batches:
        count = max(0, min(windows, batch.windows))
        windows -= count
        if count:
            ahead.append(batch.rows(slice(count)))
        if count < batch.windows:
            behind.append(batch.rows(slice(count, None)))
    return ahead, behind


def _cut(batch: CalibrationBatch, row: int, length: int) -> CalibrationBatch:
    """``length`` columns of one row, from the first token that counts if enough columns follow it."""
    counts = batch.counts()[row]
    start = min(int(counts.int().argmax()), batch.length - length)
    columns = slice(start, start + length)
    inputs = {}
    for key, value in batch.inputs.items():
        own = value[row : row + 1] if len(value) == batch.windows else value[:1]
        across = key == "attention_mask" and own.dim() == 4  # queries by keys
        inputs[key] = own[..., columns, columns] if across else own[:, columns]
    return CalibrationBatch(inputs, counts[None, columns].to(own.device))


def _rows_that_count(batch: CalibrationBatch) -> list[int]:
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or len(mask) != batch.windows:
        return list(range(batch.windows))
    rows: list[int] = mask.bool().any(1).nonzero().flatten().tolist()
    return rows


def _valid(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if mask is not None and mask.dim() == 2 and not bool(mask.all()) else None
