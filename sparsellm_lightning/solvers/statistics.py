"""Second-order statistics of calibration tokens: Gram and cross matrices.

Shape letters: n tokens, d and e features. Statistics are float32, whatever the dtype of the activations. Sums over tokens are
float64.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from sparsellm_lightning.solvers.errors import NumericalError
from sparsellm_lightning.solvers.factorization import Factor, factorize
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.ranks import Ranks

_SYMMETRIC_BLOCK = 512


class Cross:
    """Mean over tokens of ``a bᵀ``: ``AᵀB / n``, (d, e), summed over chunks and over ranks.

    Products are float32 (or ``dtype``), their sums float64. So the result does not depend on the order of the chunks, nor on
    which rank has which chunk, except for a rounding in about 1e-9 of the entries. One and many ranks get equal masks only
    because of that: factorisations and later blocks amplify a difference in the last float32 bit.

    Args:
        rows: d.
        columns: e.
        device: of the tokens.
        dtype: of the products.
    """

    def __init__(
        self, rows: int, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self._sum = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._tokens = 0
        self._product = torch.empty(self._product_rows(), columns, dtype=dtype, device=device)

    def _product_rows(self) -> int:
        return self._sum.shape[0]

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add tokens: a (n, d) and b (n, e), of the dtype of the products."""
        self._sum.add_(torch.mm(a.T, b, out=self._product))
        self._tokens += a.shape[0]
        count(2 * len(a) * self._sum.numel(), self._product.dtype)

    def mean(self, ranks: Ranks) -> Tensor:
        """``AᵀB / n`` over all ranks' tokens, float32. To be called once, after the last :meth:`add`."""
        (tokens,) = ranks.total(self._tokens)
        self._sum_over(ranks)
        return self._sum.div_(max(tokens, 1)).float()

    def _sum_over(self, ranks: Ranks) -> None:
        ranks.sum_(self._sum)


class Gram(Cross):
    """Mean over tokens of ``x xᵀ``: ``XᵀX / n``, (d, d)."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, features, device)

    def _product_rows(self) -> int:
        return min(_SYMMETRIC_BLOCK, self._sum.shape[0])

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """Add tokens ``a``, (n, d), of any dtype. Only the blocks on and above the diagonal are computed."""
        a = a.float()
        features = a.shape[1]
        for low in range(0, features, _SYMMETRIC_BLOCK):
            rows = slice(low, min(low + _SYMMETRIC_BLOCK, features))
            product = self._product.view(-1)[: (rows.stop - low) * (features - low)].view(-1, features - low)
            self._sum[rows, low:].add_(torch.mm(a[:, rows].T, a[:, low:], out=product))
            count(2 * len(a) * product.numel())
        self._tokens += a.shape[0]

    def _sum_over(self, ranks: Ranks) -> None:
        starts = range(0, len(self._sum), _SYMMETRIC_BLOCK)
        if ranks.size > 1:
            # Only the computed blocks travel, as one message.
            parts = [self._sum[low : low + _SYMMETRIC_BLOCK, low:] for low in starts]
            message = torch.cat([part.flatten() for part in parts])
            ranks.sum_(message)
            for part, summed in zip(parts, message.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))
        for low in starts:
            high = low + _SYMMETRIC_BLOCK
            diagonal = self._sum[low:high, low:high]  # products may be rounded otherwise below the diagonal than above
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            self._sum[high:, low:high] = self._sum[low:high, high:].T

    def statistics(self, damping: float, ranks: Ranks, name: str) -> InputStatistics:
        """Statistics of the added input, that of the projection ``name``. For ``damping`` see :class:`InputStatistics`.

        Raises:
            NumericalError: NaN or infinity in the input, on every rank.
        """
        mean = self.mean(ranks)
        check_finite(mean, name)
        return InputStatistics(mean, damping, name)


class InputStatistics:
    """Gram matrix of a projection's input, and its factorisation, computed on first use.

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
        """The same Gram matrix under another damping. Kept, so that each damping is factored once."""
        if damping == self.damping:
            return self
        return self._damped.setdefault(damping, InputStatistics(self.gram, damping, self.name))

    @cached_property
    def factor(self) -> Factor:
        """See :func:`~sparsellm_lightning.solvers.factorization.factorize`."""
        return factorize(self.gram, self.damping, self.name)


def all_finite(x: Tensor) -> bool:
    """Whether a tensor of any shape, of floats or integers, has neither NaN nor infinity. Nothing of its size is allocated."""
    # The extremes of a tensor with NaN are NaN. isfinite copies all entries, a gigabyte for a large vocabulary's embeddings.
    return x.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(x))


def check_finite(statistics: Tensor, name: str, what: str = "input") -> None:
    """Refuse NaN and infinity, which would end up in weights. To be called on statistics over all ranks.

    Raises:
        NumericalError: names the projection, on every rank.
    """
    if not all_finite(statistics):
        raise NumericalError(
            f"Activations must be finite, but the {what} of {name} holds NaN or infinity on the calibration tokens. "
            "Check the calibration text and the dense model, or run in bf16 or float32 rather than float16."
        )


def relative_error(dense: Tensor, pruned: Tensor, gram: Tensor, ranks: Ranks) -> float:
    """``‖X(W − Ŵ)ᵀ‖² / ‖X Wᵀ‖²`` over all ranks, from the Gram matrix of X. 0 where the dense output is 0.

    Args:
        dense: W, (r, d) float32, this rank's rows.
        pruned: Ŵ, like ``dense``.
        gram: ``XᵀX / n``, (d, d).
        ranks: hold the other rows.
    """
    difference = dense - pruned
    count(4 * dense.numel() * len(gram))
    sums = torch.stack([((difference @ gram) * difference).sum(), ((dense @ gram) * dense).sum()])
    sums = sums.to(torch.float64)
    ranks.sum_(sums)
    return float(sums[0] / sums[1]) if sums[1] > 0 else 0.0
