"""The alternation's auxiliary variables z, s and p of every token, and their updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm_lightning.solvers.activations import Entrywise
from sparsellm_lightning.solvers.factorization import spd_inverse
from sparsellm_lightning.solvers.feed_forward import FeedForward, Tokens, scaled
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.ranks import Ranks
from sparsellm_lightning.solvers.statistics import Cross, Gram, InputStatistics
from sparsellm_lightning.solvers.storage import Shelf

_LEAST_RIDGE = 1e-6  # share of the mean diagonal of W Wᵀ


@dataclass(frozen=True)
class Penalties:
    """Weights of the three terms of the alternation's objective.

    Args:
        alpha: of the pre-activation terms, ``α(‖z − X W_uᵀ‖² + ‖s − X W_gᵀ‖²)``.
        beta: of the output term, ``β‖Y − p W_dᵀ‖²``.
        gamma: of the activation term, ``γ‖p − φ(s) ⊙ z‖²``.
        scale_free: divide each term by the mean square of its target (z, s, Y, p) on the dense block. False: the paper's raw
            objective.
    """

    alpha: float = 1.0
    beta: float = 10.0
    gamma: float = 1.0
    scale_free: bool = True


class Auxiliaries:
    """The variables z and s of this rank's tokens, and their updates. p is computed when it is needed and not stored.

    Args:
        dense: the dense block. Its pre-activations are the first values.
        tokens: that have auxiliaries.
        penalties: α, β, γ.
        damping: of the statistics of p.
        ranks: the data-parallel ranks.
        dtype: of z, s and the products that update them.
        storage: device where z and s are kept.
        step: :func:`~sparsellm_lightning.solvers.activations.preactivation_step`.
    """

    def __init__(
        self,
        dense: FeedForward,
        tokens: Tokens,
        penalties: Penalties,
        damping: float,
        ranks: Ranks,
        dtype: torch.dtype,
        storage: torch.device,
        step: Entrywise,
    ) -> None:
        self.step = step
        self.tokens, self.ranks, self.damping, self.dtype = tokens, ranks, damping, dtype
        self.raw = not penalties.scale_free
        self.z, self.s = Shelf(dtype, storage), Shelf(dtype, storage)
        # Sums of the mean squares of z, s, Y and p, and the number of tokens.
        squares = torch.zeros(5, dtype=torch.float64, device=dense.up.device)
        rounded = dense.to(dtype)
        for index, (x_c, y_c, _, root) in enumerate(tokens):
            z, s = (None if t is None else t.float() for t in rounded.preactivations(x_c.to(dtype)))
            assert z is not None
            p = dense.combine(z, s)
            parts = [
                scaled(t, root).square().mean(1).sum(dtype=torch.float64)
                for t in (z, z if s is None else s, y_c, p, torch.ones_like(x_c[:, :1]))
            ]
            squares += torch.stack(parts)
            self._put(index, z, s)
        ranks.sum_(squares)
        (number,) = ranks.total(sum(tokens.sizes))
        # 1 over all fitted tokens, but not over these.
        self.mean_weight = (squares[4] / max(number, 1)).clamp(min=1e-12).float()
        scales = (squares[:4] / squares[4]).clamp(min=1e-12).tolist() if penalties.scale_free else [1.0] * 4
        self.gamma_over_beta = penalties.gamma / scales[3] / (penalties.beta / scales[2])
        self.rho_z, self.rho_s = (
            torch.tensor(
                penalties.gamma / scales[3] / (penalties.alpha / scale), device=squares.device, dtype=torch.float32
            )
            for scale in scales[:2]
        )

    def update(self, iterate: FeedForward) -> tuple[dict[str, Tensor], tuple[InputStatistics, Tensor] | None]:
        """Update p, z and s for the current weights.

        Returns:
            ``(z − m)ᵀX / n`` for ``"up"`` and ``(s − m)ᵀX / n`` for ``"gate"``, (f, d), over all ranks, n being the number of
            tokens (with weights, their sum) and m the pre-activation that the current weights give; and for the raw objective
            the statistics ``pᵀp / n`` and ``Yᵀp / n``, otherwise None.
        """
        down, device, gated = iterate.down, iterate.down.device, iterate.gate is not None
        gram = down @ down.T
        count(2 * down.numel() * len(down))
        # Not less than float32 can resolve beside the entries of W Wᵀ, which is singular where outputs outnumber hidden units.
        ridge = (_LEAST_RIDGE * gram.diagonal().mean()).clamp(min=max(self.gamma_over_beta, 1e-12))
        # Rounding is harmless here: it is averaged over the tokens before it reaches a weight.
        k = spd_inverse(gram, ridge).to(self.dtype)
        rounded_down = down.to(self.dtype)
        cross = {layer: Cross(down.shape[1], iterate.up.shape[1], device, self.dtype) for layer in iterate.first_layers}
        of_p = (Gram(down.shape[1], device), Cross(down.shape[0], down.shape[1], device)) if self.raw else None
        for index, (x_c, y_c, _, root) in enumerate(self.tokens):
            m_z, m_s = (None if m is None else m.to(self.dtype) for m in iterate.preactivations(x_c))
            z, s = self.z.get(index, device), self.s.get(index, device) if gated else None
            p = iterate.combine(z.float(), None if s is None else s.float())
            residual = y_c - p.to(self.dtype) @ rounded_down.T
            p += residual.to(self.dtype) @ k @ rounded_down
            count(2 * len(p) * (2 * down.numel() + k.numel()), self.dtype)
            x_rounded = x_c.to(self.dtype)
            if s is None:
                z, correction = self.step(m_z, p, self.rho_z)
            else:
                z, s, correction, correction_s = self.step(m_z, m_s, s, p, self.rho_z, self.rho_s)
                cross["gate"].add(scaled(correction_s, root), scaled(x_rounded, root))
            cross["up"].add(scaled(correction, root), scaled(x_rounded, root))
            self._put(index, z, s)
            if of_p is not None:
                of_p[0].add(scaled(p, root))
                of_p[1].add(scaled(y_c, root), scaled(p, root))
        corrections = {layer: total.mean(self.ranks) / self.mean_weight for layer, total in cross.items()}
        if of_p is None:
            return corrections, None
        gram_p, cross_p = (total.mean(self.ranks) / self.mean_weight for total in of_p)
        return corrections, (InputStatistics(gram_p, self.damping, "auxiliary p"), cross_p)

    def clear(self) -> None:
        """Free z and s."""
        self.z.clear()
        self.s.clear()

    def _put(self, index: int, z: Tensor, s: Tensor | None) -> None:
        self.z.put(index, z)
        if s is not None:
            self.s.put(index, s)
