"""Factorisation of damped Gram matrices. Computed in float32, or in float64 where float32 fails."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm_lightning.solvers.errors import NumericalError
from sparsellm_lightning.solvers.flops import count

MAX_DAMPING_RAISES = 6
_FACTOR_WORK = 4 / 3  # floating-point operations of factorising a (d, d) matrix, in units of d³
_LEAF = 64  # columns of the largest matrix that is given to LAPACK


@dataclass(frozen=True)
class Factor:
    """Inverse of a damped Gram matrix ``H = G + λI``, as ``H⁻¹ = UᵀU`` with U upper triangular.

    Args:
        upper: U, (d, d) float32. The SparseGPT sweep reads row i at column i.
        dead: (d,) bool, features that were zero for every token. They carry no information. H has the mean diagonal (plus
            damping) in their place.
    """

    upper: Tensor
    dead: Tensor

    def solve(self, rows: Tensor) -> Tensor:
        """``rows @ H⁻¹`` for rows (r, d), float32."""
        count(4 * rows.numel() * len(self.upper))
        return rows @ self.upper.T @ self.upper


def spd_inverse(matrix: Tensor, ridge: Tensor | float = 0.0) -> Tensor:
    """``(A + ridge · I)⁻¹`` of a matrix A, (d, d) float32, with which the sum is positive definite and well-conditioned.

    Raises:
        NumericalError: the sum is not positive definite.
    """
    damped = matrix.clone()
    damped.diagonal().add_(ridge)
    upper = _inverse_factor(damped)
    if upper is None:
        raise NumericalError("A matrix that must be positive definite is not. Check the weights for NaN or infinity.")
    count(2 * len(upper) ** 3)
    return upper.T @ upper


def factorize(gram: Tensor, damping: float, name: str = "") -> Factor:
    """Factor ``(G + λI)⁻¹`` with ``λ = damping * mean(diag G)``. G is not changed.

    If the matrix is not positive definite to working precision, the damping is raised tenfold, with a warning, up to
    ``MAX_DAMPING_RAISES`` times.

    Args:
        gram: G, (d, d) float32, symmetric positive semi-definite.
        damping: fraction of the mean diagonal.
        name: of the projection, for messages.

    Raises:
        NumericalError: the largest damping was not enough.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.mean()) or 1.0
    for attempt in range(MAX_DAMPING_RAISES + 1):
        fraction = damping if attempt == 0 else max(damping, 1e-4) * 10**attempt
        for dtype in (torch.float32, torch.float64):
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
        "So it is no Gram matrix of finite activations. Check them for overflow, or run in bf16 or float32."
    )


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper triangular U with ``UᵀU = H⁻¹``, written over H. None if H is not positive definite.

    Recursive by halves. With ``H = [[A, B], [Bᵀ, C]]``, V the factor of C and ``T = B Vᵀ``, U's upper left is the factor of the
    Schur complement ``A − T Tᵀ``, its lower right is V and its upper right is ``−U₁₁ T V``.

    LAPACK's result for more than a hundred columns changes with the number of threads, in the last bits. Matrix products and
    small factorisations do not. One and many ranks get equal masks only because of that.
    """
    count(_FACTOR_WORK * len(matrix) ** 3)
    return matrix if _factor_in_place(matrix) else None


def _factor_in_place(matrix: Tensor) -> bool:
    size = matrix.shape[0]
    if size <= _LEAF:
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
