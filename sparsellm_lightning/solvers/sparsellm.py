"""The SparseLLM alternation (Bai et al., arXiv 2402.17946): the matrices of a feed-forward block solved together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.placement import Placement, Shelf, empty
from sparsellm_lightning.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.activations import Activation, Entrywise, in_slices, preactivation_step
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.statistics import Cross, Gram, check_finite, factorize, spd_inverse

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
        errors: ``‖Y − FFN(X)‖² / ‖Y‖²`` after each iteration, over all ranks' tokens (those between the first and the last
            over the leading ones); the first is the local solver's.
        inputs, hidden: statistics of X, and of the hidden activation that the best iterate produces.
        output: ``FFN(X)`` of the best iterate, (n, d), in the dtype and place of Y.
    """

    feed_forward: FeedForward
    errors: list[float]
    inputs: InputStatistics
    hidden: InputStatistics
    output: Tensor


Prune = Callable[[dict[str, Tensor], InputStatistics], dict[str, Tensor]]
Work = Counter[torch.dtype]  # floating-point operations by the dtype of the operands


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
    leading_chunks: int | None = None,
    auxiliary_dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
    work: Work | None = None,
    step: Entrywise | None = None,
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
       to a tolerance (:mod:`~sparsellm_lightning.solvers.activations`).

    The first iteration skips the regressions: it is exactly the local solver, each layer calibrated after the one before
    it is pruned. So the result is never worse than that, on the calibration tokens; ``iterations=1`` is the local solver.

    The regressions' λ is ``max(damping, 2 · columns / tokens)`` of the mean diagonal: with few tokens per column an
    unregularised fit follows the noise of the calibration text (measured: held-out error 0.412 → 0.391 in SmolLM2's block 3).

    ``zᵀX`` is computed as ``(z − m)ᵀX + W_i XᵀX``, where ``m = X W_iᵀ`` is what the current weights predict, and known: what
    is summed is then only the small correction, which bears a coarse dtype.

    Only sums over tokens (Gram and cross matrices) cross ranks; z and s stay where their tokens are. Every rank prunes its
    own rows and the rows are then gathered.

    Args:
        dense: the dense block, whole, float32.
        x: its input, (n, d), this rank's tokens, any dtype; products are in float32. n may be 0 on some ranks.
        y: its target output, (n, d), any dtype. x and y may be on the host while the weights are on an accelerator.
        prune: ``({layer: rows of Ŵ}, statistics of their shared input) -> {layer: pruned rows}`` for layers ``gate`` and
            ``up`` together, then ``down``; rows are this rank's.
        iterations: at least 1.
        penalties: α, β, γ.
        damping: of the Gram matrices, for the local solver.
        ranks: the data-parallel ranks.
        chunks: tokens per step, summing to n; ``CHUNK`` by default. With one chunk per calibration window the result does
            not depend on which rank has which window.
        leading_chunks: only the tokens of this rank's first so many chunks have auxiliaries, and only they are seen by the
            iterations between the first and the last; then the better of these two is returned. None is all.
        auxiliary_dtype: of z, s, their predictions, and the products that update p, z, s and the corrections above; the Gram
            matrices, h and the errors stay float32. See :func:`coarse_dtype`.
        placement: where activations are kept; does not change the result. Everything on the weights' device by default.
        work: counts floating-point operations, the local solver's left out.
        step: :func:`~sparsellm_lightning.solvers.activations.preactivation_step` of the block, in a faster form.
        name: prefix of projection names in messages.
        on_iteration: called with (iteration, error).

    Raises:
        NumericalError: NaN or infinity in X, Y or h, or a factorisation that fails whatever the damping.
    """
    penalties = penalties or Penalties()
    device = dense.up.device
    placement = placement or Placement.everything_on(device)
    work = Counter() if work is None else work
    if step is None:
        step = partial(in_slices, preactivation_step(dense.activation, dense.gate is not None))
    tokens = _Tokens(x, y, dense.down_bias, chunks, device)
    leading = tokens if leading_chunks is None else tokens.leading(leading_chunks)
    first = ["up"] if dense.gate is None else ["gate", "up"]
    width, outputs = dense.up.shape[0], dense.down.shape[0]

    gram = Gram(x.shape[1], device)
    for x_c, _, _ in tokens:
        gram.add(x_c)
    work[torch.float32] += gram.work
    energies = tokens.energies(ranks)
    check_finite(energies, f"{name}down", "target output")
    inputs = InputStatistics(gram.mean(ranks), damping, f"{name}up")
    check_finite(inputs.gram, f"{name}{first[0]}")
    leading_energies = energies if leading is tokens else leading.energies(ranks)

    hidden_gram = Gram(width, device)
    # Where there is only one iteration, its error is a by-product of the last pass over the tokens.
    cross = Cross(outputs, width, device) if iterations > 1 else None
    auxiliaries: _Auxiliaries | None = None
    predictions = _Pair.on(device, auxiliary_dtype) if placement.predictions and iterations > 1 else None
    kept_hidden = Shelf(x.dtype, device) if placement.hidden else None
    targets = {layer: _rows(getattr(dense, layer), ranks) for layer in first}
    best: tuple[FeedForward, Tensor] | None = None
    best_error = float("inf")
    errors: list[float] = []
    for iteration in range(iterations):
        last = iteration + 1 == iterations
        if last and auxiliaries is not None:
            auxiliaries.values.clear()
        if last and predictions is not None:
            predictions.clear()
        pruned = prune(targets, inputs)
        whole = {layer: ranks.gather_rows(pruned[layer], width) for layer in first}
        iterate = replace(dense, up=whole["up"], gate=whole.get("gate"))
        seen = tokens if last or iteration == 0 else leading
        hidden_gram.restart()
        if cross is not None:
            cross.restart()
        for index, (x_c, y_c, _) in enumerate(seen):
            z, s = iterate.preactivations(x_c)
            h = iterate.combine(z, s)
            hidden_gram.add(h)
            if cross is not None:
                cross.add(y_c, h)
            if predictions is not None and not last and index < len(leading.sizes):
                predictions.put(index, z, s)
            if kept_hidden is not None and last:
                kept_hidden.put(index, h)
        work[torch.float32] += hidden_gram.work + (0 if cross is None else cross.work)
        work[torch.float32] += 2 * len(first) * seen.count * dense.up.numel()
        hidden = InputStatistics(hidden_gram.mean(ranks), damping, f"{name}down")
        check_finite(hidden.gram, f"{name}down")
        target = _rows(dense.down, ranks)
        down_inputs = hidden
        mean_cross = None if cross is None else cross.mean(ranks)
        if auxiliaries is not None:
            assert mean_cross is not None
            down_inputs, down_cross = (hidden, mean_cross) if penalties.scale_free else auxiliaries.down_statistics()
            ridge = _ridge(damping, width, hidden_gram.tokens)
            correction = down_cross - dense.down @ down_inputs.gram
            target = _rows(dense.down + factorize(down_inputs.gram, ridge, down_inputs.name).solve(correction), ranks)
        down = prune({"down": target}, down_inputs)["down"]
        iterate = replace(iterate, down=ranks.gather_rows(down, outputs))

        if mean_cross is None:
            output, error = _output(iterate, tokens, kept_hidden, ranks, energies, placement, work)
        else:
            # ‖Y − h Wᵀ‖² = ‖Y‖² − 2⟨W, Yᵀh⟩ + ⟨W hᵀh, W⟩, by rows of W: no further pass over the tokens.
            target_energy, y_energy, count = (energies if seen is tokens else leading_energies).tolist()
            explained = ((2 * _rows(mean_cross, ranks) - down @ hidden.gram) * down).sum(dtype=torch.float64)
            ranks.sum_(explained)
            error = max(target_energy - count * float(explained), 0.0) / (y_energy or 1.0)
        is_best = seen is tokens and error < best_error
        if is_best or best is None:
            best, best_error = (iterate, hidden.gram), error  # without the factorisations, which are large
        errors.append(error)
        if on_iteration is not None:
            on_iteration(iteration, error)
        if last or (error == 0 and seen is tokens):
            break
        if auxiliaries is None:
            auxiliaries = _Auxiliaries(
                dense, leading, penalties, damping, ranks, auxiliary_dtype, placement, work, step
            )
        corrections = auxiliaries.update(iterate, predictions)
        targets = {}
        regression = inputs.with_damping(_ridge(damping, x.shape[1], gram.tokens)).factor
        for layer in first:
            # Of all rows on every rank: how a product rounds depends on its shape.
            weight = getattr(dense, layer)
            correction = corrections[layer] + (getattr(iterate, layer) - weight) @ inputs.gram
            targets[layer] = _rows(weight + regression.solve(correction), ranks)
    assert best is not None
    if iterations > 1:
        kept = kept_hidden if last and is_best else None
        output, _ = _output(best[0], tokens, kept, ranks, energies, placement, work)
    return Solution(best[0], errors, inputs, InputStatistics(best[1], damping, f"{name}down"), output)


class _Tokens:
    """Chunks of this rank's tokens in float32, on the device that computes: input, target less the down bias, target."""

    def __init__(
        self, x: Tensor, y: Tensor, down_bias: Tensor | None, chunks: Sequence[int] | None, device: torch.device
    ) -> None:
        self.x, self.y, self.down_bias, self.device = x, y, down_bias, device
        self.sizes = [len(part) for part in x.split(CHUNK)] if chunks is None else list(chunks)
        self.count = sum(self.sizes)

    def leading(self, chunks: int) -> _Tokens:
        """Only the first so many chunks."""
        sizes = self.sizes[:chunks]
        return _Tokens(self.x[: sum(sizes)], self.y[: sum(sizes)], self.down_bias, sizes, self.device)

    def energies(self, ranks: Ranks) -> Tensor:
        """``‖Y − b_d‖²``, ``‖Y‖²`` and the number of tokens, over all ranks, float64."""
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        for _, y_c, y_raw in self:
            squares = [y.square().sum(dtype=torch.float64) for y in (y_c, y_raw)]
            total += torch.stack([*squares, total.new_tensor(len(y_c))])
        ranks.sum_(total)
        return total

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for x_c, y_c in zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True):
            y_raw = y_c.to(self.device, torch.float32)
            yield (
                x_c.to(self.device, torch.float32),
                y_raw if self.down_bias is None else y_raw - self.down_bias,
                y_raw,
            )


@dataclass
class _Pair:
    """z and s, or what is predicted for them, by chunk; no s where the block is not gated."""

    z: Shelf
    s: Shelf

    @classmethod
    def on(cls, home: torch.device, dtype: torch.dtype) -> _Pair:
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


class _Auxiliaries:
    """The variables z and s of this rank's tokens, and their updates. p is never stored."""

    def __init__(
        self,
        dense: FeedForward,
        tokens: _Tokens,
        penalties: Penalties,
        damping: float,
        ranks: Ranks,
        dtype: torch.dtype,
        placement: Placement,
        work: Work,
        step: Entrywise,
    ) -> None:
        self.step = step
        self.tokens, self.ranks, self.damping, self.dtype, self.work = tokens, ranks, damping, dtype, work
        self.keep_p = not penalties.scale_free
        self.values = _Pair.on(placement.auxiliaries, dtype)
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
        work[dtype] += 2 * (1 if dense.gate is None else 2) * len(tokens.x) * dense.up.numel()
        ranks.sum_(squares)
        scales = (squares[:4] / squares[4]).clamp(min=1e-12).tolist() if penalties.scale_free else [1.0] * 4
        self.gamma_over_beta = penalties.gamma / scales[3] / (penalties.beta / scales[2])
        self.rho_z, self.rho_s = (
            torch.tensor(
                penalties.gamma / scales[3] / (penalties.alpha / scale), device=squares.device, dtype=torch.float32
            )
            for scale in scales[:2]
        )

    def update(self, iterate: FeedForward, predictions: _Pair | None) -> dict[str, Tensor]:
        """Update p, z and s for these weights; returns ``(z − m)ᵀX / n`` and the same of s, (f, d), over all ranks.

        Args:
            iterate: the current weights.
            predictions: m, what they predict for z and s; computed again where None.
        """
        down, device, gated = iterate.down, iterate.down.device, iterate.gate is not None
        k = down @ down.T
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
        n, (outputs, width) = len(self.tokens.x), down.shape
        self.work[self.dtype] += 4 * n * outputs * width + 2 * n * outputs**2 + sum(c.work for c in cross.values())
        if predictions is None:
            self.work[torch.float32] += 2 * len(cross) * n * iterate.up.numel()
        return {layer: total.mean(self.ranks) for layer, total in cross.items()}

    def down_statistics(self) -> tuple[InputStatistics, Tensor]:
        """``pᵀp / n`` and ``Yᵀp / n`` of the last update, over all ranks (kept only for the paper's raw objective)."""
        return InputStatistics(self.gram_p.mean(self.ranks), self.damping, "auxiliary p"), self.cross_p.mean(self.ranks)


def feed_forward_output(
    feed_forward: FeedForward, x: Tensor, chunks: Sequence[int], like: Tensor, home: torch.device | None = None
) -> Tensor:
    """``FFN(X)``, (n, d), in the dtype of ``like``: bit for bit the :class:`Solution`'s for the same weights and chunks."""
    tokens = _Tokens(x, like, feed_forward.down_bias, chunks, feed_forward.up.device)
    home = home or feed_forward.up.device
    placement = Placement(home, home)
    return _output(feed_forward, tokens, None, SINGLE, torch.ones(3), placement, Counter())[0]


def _output(
    feed_forward: FeedForward,
    tokens: _Tokens,
    hidden: Shelf | None,
    ranks: Ranks,
    energies: Tensor,
    placement: Placement,
    work: Work,
) -> tuple[Tensor, float]:
    """``FFN(X)`` of this rank's tokens, and ``‖Y − FFN(X)‖² / ‖Y‖²`` over all ranks'."""
    device = feed_forward.up.device
    output = empty(tokens.y.shape, tokens.y.dtype, placement.inputs, device)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    start = 0
    for index, (x_c, _, y_raw) in enumerate(tokens):
        # Rounded as the model rounds it, whether it was kept or not.
        h = feed_forward.hidden(x_c).to(tokens.x.dtype) if hidden is None else hidden.get(index, device)
        part = torch.nn.functional.linear(h.float(), feed_forward.down, feed_forward.down_bias)
        squares += (y_raw - part).square_().sum(dtype=torch.float64)
        output[start : start + len(part)] = part
        start += len(part)
    ranks.sum_(squares)
    matrices = 1 + (hidden is None) * (1 if feed_forward.gate is None else 2)
    work[torch.float32] += 2 * matrices * len(output) * feed_forward.down.numel()
    return output, float(squares) / (float(energies[1]) or 1.0)


def _ridge(damping: float, columns: int, tokens: int) -> float:
    """Damping of a regression on so many columns: ``argmin_Ŵ ‖T − XŴᵀ‖² + λ‖Ŵ − W‖² = W + (T − XWᵀ)ᵀX (XᵀX + λI)⁻¹``."""
    return max(damping, 2 * columns / max(tokens, 1))


def _rows(matrix: Tensor, ranks: Ranks) -> Tensor:
    return matrix[ranks.local_rows(matrix.shape[0])]
