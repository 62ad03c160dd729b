"""What pruning one block did: filled by the walker, noted by the journal, shown by the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class BlockResult:
    """Errors of one block, and the seconds it took.

    Args:
        index: of the block.
        errors: relative error of the feed-forward output after each iteration, ``‖Y − FFN(X)‖² / ‖Y‖²``, on fitted tokens;
            empty where a local solver was followed by reconstruction, which measures the block's output.
        held_out_errors: the same on the held-out tokens; empty where there are none.
        layer_errors: by projection name, ``‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`` of the weights as stored, X being the fitted tokens of the
            input it was calibrated on; before reconstruction.
        reconstruction: relative errors of the block's output before and after, ``"held_out"`` (None where nothing is) and
            ``"fitted"`` (of about as many windows as are held out), as
            :class:`~sparsellm_lightning.reconstruct.Reconstructor` measures them, and how many steps were kept, ``"steps"``;
            None where the block was not reconstructed.
        seconds: wall time.
    """

    index: int
    errors: list[float] = field(default_factory=list)
    held_out_errors: list[float] = field(default_factory=list)
    layer_errors: dict[str, float] = field(default_factory=dict)
    reconstruction: dict[str, Any] | None = None
    seconds: float = 0.0
