"""Second-order statistics of calibration tokens: Gram and cross matrices, and their factorisation.

Shape letters: n tokens, d and e features. Statistics are float32, whatever the dtype of the activations; sums and
factorisations go through float64.
"""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

from sparsellm_lightning.errors import NumericalError
from sparsellm_lightning.ranks import Ranks

MAX_DAMPING_RAISES = 6


class Cross:
    """Mean over tokens of ``a bᵀ``: ``AᵀB / n``, (d, e), summed over chunks and over ranks.

    Products are float32; their sums are float64, so that the result does not depend on the order of the chunks nor on how
    they are spread over ranks, but for a rounding in some 1e-9 of the entries. That is what makes the masks of one and of
    many ranks equal: a difference in the last float32 bit, amplified through factorisations and blocks, flips 0.2 % of them.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(rows, columns, dtype=_exact(device), device=device)
        self.tokens = 0
        self._product = torch.empty(rows, columns, dtype=torch.float32, device=device)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add tokens: a (n, d) and b (n, e), float32."""
        self.total.add_(torch.mm(a.T, b, out=self._product))
        self.tokens += a.shape[0]

    def mean(self, ranks: Ranks) -> Tensor:
        """``AᵀB / n`` over all ranks' tokens, float32, so that its scale does not depend on their number. Ends the summing."""
        tokens = torch.tensor([self.tokens], dtype=torch.int64, device=self.total.device)
        ranks.sum_(self.total, tokens)
        self.tokens = int(tokens)
        return self.total.div_(max(self.tokens, 1)).float()


class Gram(Cross):
    """Mean over tokens of ``x xᵀ``: ``XᵀX / n``, (d, d)."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, features, device)

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """Add tokens ``a``, (n, d), of any dtype."""
        a = a.float()
        super().add(a, a)


def _exact(device: torch.device | str) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class Factor:
    """Cholesky factorisation of a damped Gram matrix ``H = G + λI``, of which solvers use two forms.

    With J the reversal of the features and ``J H J = L Lᵀ``, ``U = (J L J)⁻¹`` is upper triangular and ``H⁻¹ = UᵀU``: one
    Cholesky factorisation and one triangular inverse, instead of factor, invert, factor again. In float64: float32
    factorisations differ with the number of threads.

    Args:
        lower: L, (d, d).
        dead: (d,) bool, features that were zero for every token. They carry no information: H has the mean diagonal (plus
            damping) in their place.
    """

    def __init__(self, lower: Tensor, dead: Tensor) -> None:
        self._lower = lower
        self.dead = dead

    @cached_property
    def upper(self) -> Tensor:
        """U, (d, d) float32. Row i is what the SparseGPT sweep needs at column i."""
        return _upper_inverse(self._lower.flip(0, 1)).float()

    def solve(self, rows: Tensor) -> Tensor:
        """``rows @ H⁻¹`` for rows (r, d), float32."""
        right = rows.to(self._lower.dtype).flip(1).T
        return torch.cholesky_solve(right, self._lower).flip(0).T.to(rows.dtype).contiguous()


def _upper_inverse(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves: a third of the work of solving for the identity, as products."""
    size = upper.shape[0]
    if size <= 128:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return solved
    half = size // 2
    inverse = torch.zeros_like(upper)
    first, last = _upper_inverse(upper[:half, :half]), _upper_inverse(upper[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ (upper[:half, half:] @ last))
    return inverse


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
    exact = gram.to(_exact(gram.device))
    for attempt in range(MAX_DAMPING_RAISES + 1):
        fraction = damping if attempt == 0 else max(damping, 1e-4) * 10**attempt
        damped = exact.clone()
        damped.diagonal().add_(fraction * mean).add_(dead.to(exact.dtype) * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return Factor(lower, dead)
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
    return ((difference @ gram) * difference).sum(), ((dense @ gram) * dense).sum()
