"""The local solvers behind one signature: a weight, the statistics of its input, a pattern -> the pruned weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from sparsellm_lightning.config import Refine
from sparsellm_lightning.patterns import Pattern
from sparsellm_lightning.solvers.admm import admm
from sparsellm_lightning.solvers.magnitude import magnitude
from sparsellm_lightning.solvers.sparsegpt import sparsegpt
from sparsellm_lightning.solvers.swaps import swap_refine
from sparsellm_lightning.solvers.wanda import wanda
from sparsellm_lightning.statistics import Factor, factorize


class InputStatistics:
    """Gram matrix of a projection's input, and its factorisation, made once when first wanted.

    Args:
        gram: ``XᵀX / n``, (d, d) float32.
        damping: fraction of the mean diagonal added before factoring.
        name: of the projection, for messages.
    """

    def __init__(self, gram: Tensor, damping: float, name: str = "") -> None:
        self.gram = gram
        self.damping = damping
        self.name = name
        self._damped: dict[float, InputStatistics] = {}

    def with_damping(self, damping: float) -> InputStatistics:
        """The same Gram matrix under another damping; kept, so that its factorisation is made once."""
        if damping == self.damping:
            return self
        return self._damped.setdefault(damping, InputStatistics(self.gram, damping, self.name))

    @cached_property
    def factor(self) -> Factor:
        return factorize(self.gram, self.damping, self.name)


LocalSolve = Callable[[Tensor, InputStatistics, Pattern, int], Tensor]

LOCAL_SOLVERS: dict[str, LocalSolve] = {
    "magnitude": lambda weight, inputs, pattern, block_size: magnitude(weight, pattern),
    "wanda": lambda weight, inputs, pattern, block_size: wanda(weight, inputs.gram, pattern),
    "admm": lambda weight, inputs, pattern, block_size: admm(weight, inputs.gram, inputs.damping, pattern),
    "sparsegpt": lambda weight, inputs, pattern, block_size: sparsegpt(weight, inputs.factor, pattern, block_size),
}


def refined(
    weight: Tensor, target: Tensor, inputs: InputStatistics, pattern: Pattern, refine: Refine, keep_zeros: bool = False
) -> Tensor:
    """A local solver's result with its kept weights solved for again, and with a better mask where that is asked for.

    Args:
        weight: the result, (rows, columns) float32.
        target: Ŵ that it approximates, like ``weight``.
        inputs: their input's statistics.
        pattern: that the result is in; it still is afterwards.
        refine: how far to go, see :class:`~sparsellm_lightning.config.PruningConfig`.
        keep_zeros: no pruned weight may come back: the mask stays.
    """
    if refine == "none":
        return weight
    rounds = 3 if refine == "mask" and not keep_zeros else 0
    return swap_refine(weight, target, inputs.gram, inputs.damping, weight != 0, pattern.group, rounds=rounds)[0]
