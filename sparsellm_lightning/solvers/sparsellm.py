"""The SparseLLM alternation (Bai et al., arXiv 2402.17946): the matrices of a feed-forward block solved together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.activations import Activation, solve_preactivation
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.statistics import Cross, Gram, check_finite, spd_inverse

CHUNK = 1024  # tokens per step: large enough for efficient products, small enough that auxiliaries stay near the cache


def coarse_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, otherwise float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and any(
            getattr(torch.cpu, check, bool)() for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block as tensors: ``y = W_d (φ(W_g x + b_g) ⊙ (W_u x + b_u)) + b_d``, or ``W_d φ(W_u x + b_u) + b_d``.

    Args:
        activation: φ.
        up, gate: (f, d) float32; ``gate=None`` for a plain block.
        down: (d, f) float32.
        up_bias, gate_bias, down_bias: (f,), (f,) and (d,), or None.
    """

    activation: Activation
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> FeedForward:
        """The same weights and biases in another dtype."""
        tensors: Any = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def preactivations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``z`` and ``s`` (None when not gated) for tokens x, (n, d): each (n, f)."""
        linear = torch.nn.functional.linear
        return linear(x, self.up, self.up_bias), (None if self.gate is None else linear(x, self.gate, self.gate_bias))

    def combine(self, z: Tensor, s: Tensor | None) -> Tensor:
        """The hidden activation ``φ(s) ⊙ z``, or ``φ(z)``."""
        return self.activation(z) if s is None else self.activation(s) * z

    def hidden(self, x: Tensor) -> Tensor:
        """(n, f) hidden activation for tokens x, (n, d)."""
        return self.combine(*self.preactivations(x))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.hidden(x), self.down, self.down_bias)


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


@dataclass(frozen=True)
class Solution:
    """Result of :func:`solve_feed_forward`.

    Args:
        feed_forward: the best iterate's weights, whole on every rank.
        errors: ``‖Y − FFN(X)‖² / ‖Y‖²`` after each iteration, over all ranks' tokens; the first is the local solver's.
        inputs, hidden: statistics of X, and of the hidden activation that the best iterate produces.
    """

    feed_forward: FeedForward
    errors: list[float]
    inputs: InputStatistics
    hidden: InputStatistics


Prune = Callable[[dict[str, Tensor], InputStatistics], dict[str, Tensor]]


@torch.no_grad()
def solve_feed_forward(
    dense: FeedForward,
    x: Tensor,
    y: Tensor,
    prune: Prune,
    *,
    iterations: int = 4,
    penalties: Penalties | None = None,
    damping: float = 0.01,
    ranks: Ranks = SINGLE,
    chunks: Sequence[int] | None = None,
    auxiliary_dtype: torch.dtype = torch.float32,
    name: str = "",
    on_iteration: Callable[[int, float], None] | None = None,
) -> Solution:
    """Minimise ``β‖Y − p W_dᵀ‖² + γ‖p − φ(s) ⊙ z‖² + α(‖z − X W_uᵀ‖² + ‖s − X W_gᵀ‖²)`` with every W in its pattern.

    The auxiliary ``z``, ``s`` start at the dense block's values. One iteration:

    1. up and gate: regress ``z`` and ``s`` on X, ``Ŵ = W + (zᵀX − W XᵀX)(XᵀX + λI)⁻¹`` around the dense W, then prune Ŵ.
    2. down: the same from the hidden activation ``h = φ(X W_gᵀ) ⊙ X W_uᵀ`` which the pruned layers really give, towards
       Y. This takes ``p = h`` in the weight step, so the iterate's down projection minimises the true error; with
       ``scale_free=False`` the auxiliary ``p`` is used, as in the paper.
    3. measure ``‖Y − h W_dᵀ‖² / ‖Y‖²`` and keep the iterate if it is the best so far.
    4. ``p = q + (Y − q W_dᵀ) K W_d`` with ``q = φ(s) ⊙ z``, ``K = (W_d W_dᵀ + γ/β I)⁻¹``; then z, then s, in closed form or
       to a tolerance (:func:`~sparsellm_lightning.solvers.activations.solve_preactivation`).

    The first iteration skips the regressions: it is exactly the local solver, each layer calibrated after the one before
    it is pruned. So the result is never worse than that, on the calibration tokens; ``iterations=1`` is the local solver.

    The regressions' λ is ``max(damping, 2 · columns / tokens)`` of the mean diagonal: with few tokens per column an
    unregularised fit follows the noise of the calibration text (measured: held-out error 0.412 → 0.391 in SmolLM2's block 3).

    Only sums over tokens (Gram and cross matrices) cross ranks; z and s stay where their tokens are. Every rank prunes its
    own rows and the rows are then gathered.

    Args:
        dense: the dense block, whole, float32.
        x: its input, (n, d), this rank's tokens, any dtype; products are in float32. n may be 0 on some ranks.
        y: its target output, (n, d), any dtype.
        prune: ``({layer: rows of Ŵ}, statistics of their shared input) -> {layer: pruned rows}`` for layers ``gate`` and
            ``up`` together, then ``down``; rows are this rank's.
        iterations: at least 1.
        penalties: α, β, γ.
        damping: of the Gram matrices, for the local solver.
        ranks: the data-parallel ranks.
        chunks: tokens per step, summing to n; ``CHUNK`` by default. With one chunk per calibration window the result does
            not depend on which rank has which window.
        auxiliary_dtype: of the products that update p, z and s; all that decides a weight (Gram and cross matrices, errors)
            stays float32. See :func:`coarse_dtype`.
        name: prefix of projection names in messages.
        on_iteration: called with (iteration, error).

    Raises:
        NumericalError: NaN or infinity in X, Y or h, or a factorisation that fails whatever the damping.
    """
    penalties = penalties or Penalties()
    tokens = _Tokens(x, y, dense.down_bias, chunks)
    first = ["up"] if dense.gate is None else ["gate", "up"]
    width, outputs = dense.up.shape[0], dense.down.shape[0]

    gram = Gram(x.shape[1], x.device)
    energies = torch.zeros(2, dtype=torch.float64, device=x.device)
    for x_c, y_c, y_raw in tokens:
        gram.add(x_c)
        energies += torch.stack([y_c.square().sum(dtype=torch.float64), y_raw.square().sum(dtype=torch.float64)])
    ranks.sum_(energies)
    check_finite(energies, f"{name}down", "target output")
    inputs = InputStatistics(gram.mean(ranks), damping, f"{name}up")
    check_finite(inputs.gram, f"{name}{first[0]}")
    target_energy, y_energy = (float(energy) / max(gram.tokens, 1) for energy in energies)

    auxiliaries: _Auxiliaries | None = None
    targets = {layer: _rows(getattr(dense, layer), ranks) for layer in first}
    best: tuple[FeedForward, InputStatistics] | None = None
    errors: list[float] = []
    for iteration in range(iterations):
        pruned = prune(targets, inputs)
        whole = {layer: ranks.gather_rows(pruned[layer], width) for layer in first}
        iterate = replace(dense, up=whole["up"], gate=whole.get("gate"))
        hidden, cross = _hidden_statistics(iterate, tokens, damping, ranks, f"{name}down")
        check_finite(hidden.gram, f"{name}down")
        target = _rows(dense.down, ranks)
        down_inputs = hidden
        if auxiliaries is not None:
            down_inputs, down_cross = (hidden, cross) if penalties.scale_free else auxiliaries.down_statistics()
            target = _regress(target, down_inputs, _rows(down_cross, ranks), gram.tokens)
        down = prune({"down": target}, down_inputs)["down"]
        iterate = replace(iterate, down=ranks.gather_rows(down, outputs))

        # ‖Y − h Wᵀ‖² = ‖Y‖² − 2⟨W, Yᵀh⟩ + ⟨W hᵀh, W⟩, by rows of W: no further pass over the tokens.
        explained = ((2 * _rows(cross, ranks) - down @ hidden.gram) * down).sum(dtype=torch.float64)
        ranks.sum_(explained)
        error = max(target_energy - float(explained), 0.0) / (y_energy or 1.0)
        if best is None or error < min(errors):
            best = iterate, hidden
        errors.append(error)
        if on_iteration is not None:
            on_iteration(iteration, error)
        if iteration + 1 == iterations or error == 0:
            break
        if auxiliaries is None:
            auxiliaries = _Auxiliaries(dense, tokens, penalties, damping, ranks, auxiliary_dtype)
        crosses = auxiliaries.update(iterate)
        targets = {
            layer: _regress(_rows(getattr(dense, layer), ranks), inputs, _rows(crosses[layer], ranks), gram.tokens)
            for layer in first
        }
    assert best is not None
    return Solution(best[0], errors, inputs, best[1])


class _Tokens:
    """Chunks of this rank's tokens in float32: input, target less the down bias, and target."""

    def __init__(self, x: Tensor, y: Tensor, down_bias: Tensor | None, chunks: Sequence[int] | None) -> None:
        self.x, self.y, self.down_bias = x, y, down_bias
        self.sizes = [len(part) for part in x.split(CHUNK)] if chunks is None else list(chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for x_c, y_c in zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True):
            y_c = y_c.float()
            yield x_c.float(), y_c if self.down_bias is None else y_c - self.down_bias, y_c


class _Auxiliaries:
    """The variables z and s of this rank's tokens, in the dtype of X, and their updates. p is never stored."""

    def __init__(
        self,
        dense: FeedForward,
        tokens: _Tokens,
        penalties: Penalties,
        damping: float,
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> None:
        self.tokens, self.ranks, self.damping, self.dtype = tokens, ranks, damping, dtype
        self.keep_p = not penalties.scale_free
        self.chunks: list[tuple[Tensor, Tensor | None]] = []
        squares = torch.zeros(
            5, dtype=torch.float64, device=dense.up.device
        )  # of z, s, Y, p; and their number of tokens
        for x_c, y_c, _ in tokens:
            z, s = dense.preactivations(x_c)
            p = dense.combine(z, s)
            parts = [t.square().mean(1).sum(dtype=torch.float64) for t in (z, z if s is None else s, y_c, p)]
            squares += torch.stack([*parts, parts[0].new_tensor(len(x_c))])
            self.chunks.append((z.to(tokens.x.dtype), None if s is None else s.to(tokens.x.dtype)))
        ranks.sum_(squares)
        scales = (squares[:4] / squares[4]).clamp(min=1e-12).tolist() if penalties.scale_free else [1.0] * 4
        self.alpha_z, self.alpha_s = penalties.alpha / scales[0], penalties.alpha / scales[1]
        self.beta, self.gamma = penalties.beta / scales[2], penalties.gamma / scales[3]

    def update(self, iterate: FeedForward) -> dict[str, Tensor]:
        """Update p, z and s for these weights; returns ``zᵀX / n`` and ``sᵀX / n``, (f, d), over all ranks, bias removed."""
        down = iterate.down
        k = down @ down.T
        k.diagonal().add_(self.gamma / self.beta)
        # What only moves the auxiliaries may be rounded: it is averaged over the tokens before it reaches a weight.
        rounded = iterate.to(self.dtype)
        k = spd_inverse(k).to(self.dtype)
        cross = {
            layer: Cross(down.shape[1], iterate.up.shape[1], down.device)
            for layer in (["up"] if iterate.gate is None else ["gate", "up"])
        }
        if self.keep_p:
            self.gram_p, self.cross_p = (
                Gram(down.shape[1], down.device),
                Cross(down.shape[0], down.shape[1], down.device),
            )
        for index, (x_c, y_c, _) in enumerate(self.tokens):
            stored_z, stored_s = self.chunks[index]
            z, s = stored_z.float(), None if stored_s is None else stored_s.float()
            m_z, m_s = (None if m is None else m.float() for m in rounded.preactivations(x_c.to(self.dtype)))
            assert m_z is not None
            p = iterate.combine(z, s)
            residual = y_c - p.to(self.dtype) @ rounded.down.T
            p += residual.to(self.dtype) @ k @ rounded.down
            if s is None:
                z = solve_preactivation(iterate.activation, m_z, p, self.alpha_z, self.gamma)
            else:
                assert m_s is not None
                phi = iterate.activation(s)
                z = (self.alpha_z * m_z + self.gamma * phi * p) / (self.alpha_z + self.gamma * phi.square())
                s = solve_preactivation(iterate.activation, m_s, p, self.alpha_s, self.gamma, scale=z)
                cross["gate"].add(s if iterate.gate_bias is None else s - iterate.gate_bias, x_c)
            cross["up"].add(z if iterate.up_bias is None else z - iterate.up_bias, x_c)
            self.chunks[index] = (z.to(stored_z.dtype), None if s is None else s.to(stored_z.dtype))
            if self.keep_p:
                self.gram_p.add(p)
                self.cross_p.add(y_c, p)
        return {layer: total.mean(self.ranks) for layer, total in cross.items()}

    def down_statistics(self) -> tuple[InputStatistics, Tensor]:
        """``pᵀp / n`` and ``Yᵀp / n`` of the last update, over all ranks (kept only for the paper's raw objective)."""
        return InputStatistics(self.gram_p.mean(self.ranks), self.damping, "auxiliary p"), self.cross_p.mean(self.ranks)


def _hidden_statistics(
    iterate: FeedForward, tokens: _Tokens, damping: float, ranks: Ranks, name: str
) -> tuple[InputStatistics, Tensor]:
    """``hᵀh / n`` (f, f) and ``Yᵀh / n`` (d, f) over all ranks, h the hidden activation of ``iterate``."""
    outputs, width = iterate.down.shape
    gram, cross = Gram(width, iterate.up.device), Cross(outputs, width, iterate.up.device)
    for x_c, y_c, _ in tokens:
        h = iterate.hidden(x_c)
        gram.add(h)
        cross.add(y_c, h)
    return InputStatistics(gram.mean(ranks), damping, name), cross.mean(ranks)


def _regress(weight: Tensor, inputs: InputStatistics, cross: Tensor, tokens: int) -> Tensor:
    """``argmin_Ŵ ‖T − XŴᵀ‖² + λ‖Ŵ − W‖²`` for rows W, (r, c), from ``XᵀX`` and the cross matrix ``TᵀX``, (r, c)."""
    ridge = max(inputs.damping, 2 * weight.shape[1] / tokens)
    return weight + inputs.with_damping(ridge).factor.solve(cross - weight @ inputs.gram)


def _rows(matrix: Tensor, ranks: Ranks) -> Tensor:
    return matrix[ranks.local_rows(matrix.shape[0])]
