"""Second-order statistics of calibration tokens: Gram and cross matrices, and their factorisation.

Shape letters: n tokens, d and e features. Statistics are float32, whatever the dtype of the activations; sums and
factorisations go through float64.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm_lightning.errors import NumericalError
from sparsellm_lightning.ranks import Ranks
from sparsellm_lightning.stopwatch import count

MAX_DAMPING_RAISES = 6
_SYMMETRIC_BLOCK = 512
_WELL_CONDITIONED = (
    0.05  # damping from which float32 will do, a Gram matrix's largest eigenvalue being 10^4 times its mean
)
_FACTOR_WORK = 4 / 3  # floating-point operations of factorising a (d, d) matrix, in units of d³


class Cross:
    """Mean over tokens of ``a bᵀ``: ``AᵀB / n``, (d, e), summed over chunks and over ranks.

    Products are float32 (or coarser, where asked); their sums are float64, so that the result does not depend on the order of
    the chunks nor on how they are spread over ranks, but for a rounding in some 1e-9 of the entries. That is what makes the
    masks of one and of many ranks equal: differences in the last float32 bit are amplified through factorisations and blocks.
    """

    def __init__(
        self, rows: int, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.total = torch.zeros(rows, columns, dtype=_exact(device), device=device)
        self.tokens = 0
        self._product = torch.empty(self._product_rows(), columns, dtype=dtype, device=device)

    def _product_rows(self) -> int:
        return self.total.shape[0]

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add tokens: a (n, d) and b (n, e), of the dtype of the products."""
        self.total.add_(torch.mm(a.T, b, out=self._product))
        self.tokens += a.shape[0]
        count(2 * len(a) * self.total.numel(), self._product.dtype)

    def mean(self, ranks: Ranks) -> Tensor:
        """``AᵀB / n`` over all ranks' tokens, float32, so that its scale does not depend on their number. Ends the summing."""
        tokens = torch.tensor([self.tokens], dtype=torch.int64, device=self.total.device)
        ranks.sum_(tokens)
        self._sum_over(ranks)
        self.tokens = int(tokens)
        return self.total.div_(max(self.tokens, 1)).float()

    def _sum_over(self, ranks: Ranks) -> None:
        ranks.sum_(self.total)


class Gram(Cross):
    """Mean over tokens of ``x xᵀ``: ``XᵀX / n``, (d, d)."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, features, device)

    def _product_rows(self) -> int:
        return min(_SYMMETRIC_BLOCK, self.total.shape[0])

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """Add tokens ``a``, (n, d), of any dtype. Only what is on and above the diagonal is computed, by blocks."""
        a = a.float()
        features = a.shape[1]
        for low in range(0, features, _SYMMETRIC_BLOCK):
            rows = slice(low, min(low + _SYMMETRIC_BLOCK, features))
            product = self._product.view(-1)[: (rows.stop - low) * (features - low)].view(-1, features - low)
            self.total[rows, low:].add_(torch.mm(a[:, rows].T, a[:, low:], out=product))
            count(2 * len(a) * product.numel())
        self.tokens += a.shape[0]

    def _sum_over(self, ranks: Ranks) -> None:
        starts = range(0, len(self.total), _SYMMETRIC_BLOCK)
        if ranks.size > 1:
            # Only what was computed travels, as one message.
            parts = [self.total[low : low + _SYMMETRIC_BLOCK, low:] for low in starts]
            message = torch.cat([part.flatten() for part in parts])
            ranks.sum_(message)
            for part, summed in zip(parts, message.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))
        for low in starts:
            high = low + _SYMMETRIC_BLOCK
            self.total[high:, low:high] = self.total[low:high, high:].T


def _exact(device: torch.device | str) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@dataclass(frozen=True)
class Factor:
    """Inverse of a damped Gram matrix ``H = G + λI``, as ``H⁻¹ = UᵀU`` with U upper triangular.

    Args:
        upper: U, (d, d) float32. Row i is what the SparseGPT sweep needs at column i.
        dead: (d,) bool, features that were zero for every token. They carry no information: H has the mean diagonal (plus
            damping) in their place.
    """

    upper: Tensor
    dead: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """``rows @ H⁻¹`` for rows (r, d), float32."""
        count(4 * rows.numel() * len(self.upper))
        return rows @ self.upper.T @ self.upper


def spd_inverse(matrix: Tensor) -> Tensor:
    """Inverse of a well-conditioned symmetric positive definite matrix, (d, d) float32.

    Raises:
        NumericalError: it is not positive definite.
    """
    upper = _inverse_factor(matrix.clone())
    if upper is None:
        raise NumericalError("A matrix that must be positive definite is not. Check the weights for NaN or infinity.")
    count(2 * len(upper) ** 3)
    return upper.T @ upper


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper triangular U with ``UᵀU = H⁻¹``; None if H is not positive definite. It takes H's place.

    By halves, products but for small leaves. With ``H = [[A, B], [Bᵀ, C]]``, V the factor of C and ``T = B Vᵀ``, the factor
    of the Schur complement ``A − T Tᵀ`` is U's upper left, V its lower right and ``−U₁₁ T V`` its upper right.

    LAPACK's result for a matrix of more than a hundred columns changes with the number of threads, in the last bits;
    products and small factorisations do not, and the masks of one and of many ranks rest on that.
    """
    count(_FACTOR_WORK * len(matrix) ** 3)
    return matrix if _factor_in_place(matrix) else None


def _factor_in_place(matrix: Tensor) -> bool:
    size = matrix.shape[0]
    if size <= 64:
        # With J the reversal of the features and J H J = L Lᵀ, U is J L⁻¹ J.
        lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if int(info) or not bool(torch.isfinite(lower).all()):
            return False
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1))
        return True
    half = size // 2
    first, last = matrix[:half, :half], matrix[half:, half:]
    if not _factor_in_place(last):
        return False
    across = matrix[:half, half:] @ last.T
    if not _factor_in_place(first.addmm_(across, across.T, alpha=-1)):
        return False
    torch.mm((first @ across).neg_(), last, out=across)
    matrix[:half, half:] = across
    matrix[half:, :half] = 0
    return True


def factorize(gram: Tensor, damping: float, name: str = "") -> Factor:
    """Factor ``(G + λI)⁻¹`` with ``λ = damping * mean(diag G)``; the damping is applied to a copy.

    When the matrix is not positive definite to working precision the damping is raised tenfold, with a warning, up to
    ``MAX_DAMPING_RAISES`` times.

    Args:
        gram: G, (d, d) float32, symmetric positive semi-definite.
        damping: fraction of the mean diagonal.
        name: for messages.

    Raises:
        NumericalError: no damping in that range was enough.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(MAX_DAMPING_RAISES + 1):
        fraction = damping if attempt == 0 else max(damping, 1e-4) * 10**attempt
        # float32 was good to 1e-4 on a model's every Gram matrix; float64 is for those on which it breaks down.
        for dtype in (torch.float32, _exact(gram.device)):
            damped = gram.to(dtype, copy=True)
            damped.diagonal().add_(fraction * mean).add_(dead.to(dtype) * mean)
            upper = _inverse_factor(damped)
            if upper is not None:
                return Factor(upper.float(), dead)
        if attempt < MAX_DAMPING_RAISES:
            warnings.warn(
                f"{name or 'Gram matrix'}: Cholesky factorisation failed with damping {fraction:g}; "
                f"trying {max(damping, 1e-4) * 10 ** (attempt + 1):g}.",
                stacklevel=2,
            )
    raise NumericalError(
        f"{name or 'Gram matrix'}: not positive definite even with damping raised to {fraction:g} of its mean diagonal. "
        "Use more calibration tokens, or raise damping."
    )


def check_finite(statistics: Tensor, name: str, what: str = "input") -> None:
    """Refuse statistics with NaN or infinity, which would silently end up in weights.

    Raises:
        NumericalError: names the projection. Called on reduced statistics, so all ranks raise together.
    """
    if not bool(torch.isfinite(statistics).all()):
        raise NumericalError(
            f"Activations must be finite, but the {what} of {name} holds NaN or infinity on the calibration tokens. "
            "Check the calibration text and the dense model, or run in bf16 or float32 rather than float16."
        )


def relative_error(dense: Tensor, pruned: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of ``‖X(W − Ŵ)ᵀ‖² / ‖X Wᵀ‖²`` for rows W, (r, d), from the Gram matrix of X.

    Returned apart so that rows spread over ranks can be summed before dividing.
    """
    difference = dense - pruned
    count(4 * dense.numel() * len(gram))
    return ((difference @ gram) * difference).sum(), ((dense @ gram) * dense).sum()
