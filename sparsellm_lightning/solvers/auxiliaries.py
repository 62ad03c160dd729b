"""The alternation's auxiliary variables z, s and p: one pair a token, and their updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm_lightning.placement import Placement, Shelf
from sparsellm_lightning.ranks import Ranks
from sparsellm_lightning.solvers.activations import Entrywise
from sparsellm_lightning.solvers.feed_forward import FeedForward, Tokens
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.statistics import Cross, Gram, spd_inverse
from sparsellm_lightning.stopwatch import count


@dataclass(frozen=True)
class Penalties:
    """Weights of the three terms of the objective.

    Args:
        alpha: pre-activations, ``α(‖z − X W_uᵀ‖² + ‖s − X W_gᵀ‖²)``.
        beta: output, ``β‖Y − p W_dᵀ‖²``.
        gamma: activations, ``γ‖p − φ(s) ⊙ z‖²``.
        scale_free: divide each term by the mean square of its target (z, s, Y, p) on the dense block.
    """

    alpha: float = 1.0
    beta: float = 10.0
    gamma: float = 1.0
    scale_free: bool = True


@dataclass
class Pair:
    """z and s, or what is predicted for them, by chunk; no s where the block is not gated."""

    z: Shelf
    s: Shelf

    @classmethod
    def on(cls, home: torch.device, dtype: torch.dtype) -> Pair:
        return cls(Shelf(dtype, home), Shelf(dtype, home))

    def put(self, index: int, z: Tensor, s: Tensor | None) -> None:
        self.z.put(index, z)
        if s is not None:
            self.s.put(index, s)

    def get(self, index: int, gated: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return self.z.get(index, device), self.s.get(index, device) if gated else None

    def clear(self) -> None:
        self.z.clear()
        self.s.clear()


class Auxiliaries:
    """The variables z and s of this rank's tokens, and their updates. p is never stored."""

    def __init__(
        self,
        dense: FeedForward,
        tokens: Tokens,
        penalties: Penalties,
        damping: float,
        ranks: Ranks,
        dtype: torch.dtype,
        placement: Placement,
        step: Entrywise,
    ) -> None:
        self.step = step
        self.tokens, self.ranks, self.damping, self.dtype = tokens, ranks, damping, dtype
        self.keep_p = not penalties.scale_free
        self.values = Pair.on(placement.auxiliaries, dtype)
        squares = torch.zeros(
            5, dtype=torch.float64, device=dense.up.device
        )  # of z, s, Y, p; and their number of tokens
        rounded = dense.to(dtype)
        for index, (x_c, y_c, _) in enumerate(tokens):
            z, s = (None if t is None else t.float() for t in rounded.preactivations(x_c.to(dtype)))
            assert z is not None
            p = dense.combine(z, s)
            parts = [t.square().mean(1).sum(dtype=torch.float64) for t in (z, z if s is None else s, y_c, p)]
            squares += torch.stack([*parts, parts[0].new_tensor(len(x_c))])
            self.values.put(index, z, s)
        ranks.sum_(squares)
        scales = (squares[:4] / squares[4]).clamp(min=1e-12).tolist() if penalties.scale_free else [1.0] * 4
        self.gamma_over_beta = penalties.gamma / scales[3] / (penalties.beta / scales[2])
        self.rho_z, self.rho_s = (
            torch.tensor(
                penalties.gamma / scales[3] / (penalties.alpha / scale), device=squares.device, dtype=torch.float32
            )
            for scale in scales[:2]
        )

    def update(self, iterate: FeedForward, predictions: Pair | None) -> dict[str, Tensor]:
        """Update p, z and s for these weights; returns ``(z − m)ᵀX / n`` and the same of s, (f, d), over all ranks.

        Args:
            iterate: the current weights.
            predictions: m, what they predict for z and s; computed again where None.
        """
        down, device, gated = iterate.down, iterate.down.device, iterate.gate is not None
        k = down @ down.T
        count(2 * down.numel() * len(down))
        k.diagonal().add_(self.gamma_over_beta)
        # What only moves the auxiliaries may be rounded: it is averaged over the tokens before it reaches a weight.
        k = spd_inverse(k).to(self.dtype)
        rounded_down = down.to(self.dtype)
        cross = {
            layer: Cross(down.shape[1], iterate.up.shape[1], device, self.dtype)
            for layer in (["gate", "up"] if gated else ["up"])
        }
        if self.keep_p:
            self.gram_p, self.cross_p = Gram(down.shape[1], device), Cross(down.shape[0], down.shape[1], device)
        for index, (x_c, y_c, _) in enumerate(self.tokens):
            predicted = iterate.preactivations(x_c) if predictions is None else predictions.get(index, gated, device)
            # Rounded alike, whether they were kept or are computed here.
            m_z, m_s = (None if m is None else m.to(self.dtype) for m in predicted)
            z, s = self.values.get(index, gated, device)
            p = iterate.combine(z.float(), None if s is None else s.float())
            residual = y_c - p.to(self.dtype) @ rounded_down.T
            p += residual.to(self.dtype) @ k @ rounded_down
            count(2 * len(p) * (2 * down.numel() + k.numel()), self.dtype)
            x_rounded = x_c.to(self.dtype)
            if s is None:
                z, correction = self.step(m_z, p, self.rho_z)
            else:
                z, s, correction, correction_s = self.step(m_z, m_s, s, p, self.rho_z, self.rho_s)
                cross["gate"].add(correction_s, x_rounded)
            cross["up"].add(correction, x_rounded)
            self.values.put(index, z, s)
            if self.keep_p:
                self.gram_p.add(p)
                self.cross_p.add(y_c, p)
        return {layer: total.mean(self.ranks) for layer, total in cross.items()}

    def down_statistics(self) -> tuple[InputStatistics, Tensor]:
        """``pᵀp / n`` and ``Yᵀp / n`` of the last update, over all ranks (kept only for the paper's raw objective)."""
        return InputStatistics(self.gram_p.mean(self.ranks), self.damping, "auxiliary p"), self.cross_p.mean(self.ranks)
