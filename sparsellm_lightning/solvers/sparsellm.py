"""The SparseLLM alternation (Bai et al., arXiv 2402.17946): the matrices of a feed-forward network solved together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsellm_lightning.solvers.activations import Entrywise, in_slices, preactivation_step
from sparsellm_lightning.solvers.auxiliaries import Auxiliaries, Penalties
from sparsellm_lightning.solvers.feed_forward import (
    FeedForward,
    Tokens,
    chunk_sizes,
    scaled,
    square_roots,
    squared_error,
)
from sparsellm_lightning.solvers.flops import count
from sparsellm_lightning.solvers.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.statistics import Cross, Gram, InputStatistics, check_finite

Prune = Callable[[dict[str, Tensor], InputStatistics], dict[str, Tensor]]
"""``({layer: rows of Ŵ}, statistics of their shared input) -> {layer: pruned rows}``, of this rank's rows. Called with layers
``gate`` and ``up`` together, then with ``down``."""


@dataclass(frozen=True)
class Solution:
    """A pruned feed-forward network.

    Args:
        feed_forward: its weights, whole on every rank.
        inputs: statistics of the block's input X over the fitted tokens.
        hidden: statistics of the hidden activation that the pruned weights give, over the fitted tokens (of an iterate between
            the first and the last: the leading tokens).
        errors: ``‖Y − FFN(X)‖² / ‖Y‖²`` after each iteration, over all ranks' fitted tokens (iterations between the first and
            the last: the leading tokens). The first entry is the local solver's. Empty for :func:`solve_locally`.
        held_out_errors: the same over the held-out tokens. Empty if there are none.
    """

    feed_forward: FeedForward
    inputs: InputStatistics
    hidden: InputStatistics
    errors: list[float]
    held_out_errors: list[float]


@torch.no_grad()
def solve_locally(
    dense: FeedForward,
    x: Tensor,
    prune: Prune,
    *,
    damping: float = 0.01,
    ranks: Ranks = SINGLE,
    chunks: Sequence[int] | None = None,
    weights: Tensor | None = None,
    name: str = "",
) -> Solution:
    """Prune gate and up for the input X, then down for the hidden activation that the pruned gate and up give.

    Args:
        dense: the dense block, whole, float32.
        x: its input, (n, d), this rank's fitted tokens, any dtype and device.
        prune, damping, ranks, chunks, weights, name: see :func:`solve_feed_forward`.

    Raises:
        NumericalError: NaN or infinity in X or in the hidden activation.
    """
    device, width, outputs = dense.up.device, dense.up.shape[0], dense.down.shape[0]
    sizes = chunk_sizes(x, chunks)
    roots = square_roots(weights, sizes, device)

    def tokens() -> Iterator[tuple[Tensor, Tensor | float]]:
        return zip((part.to(device, torch.float32, non_blocking=True) for part in x.split(sizes)), roots, strict=True)

    weighted = (scaled(x_c, root) for x_c, root in tokens())
    inputs = _statistics(x.shape[1], weighted, device, ranks, damping, f"{name}{dense.first_layers[0]}")
    pruned = prune({layer: _rows(getattr(dense, layer), ranks) for layer in dense.first_layers}, inputs)
    first: dict[str, Any] = {layer: ranks.gather_rows(rows, width) for layer, rows in pruned.items()}
    iterate = replace(dense, **first)
    activations = (scaled(iterate.hidden(x_c), root) for x_c, root in tokens())
    hidden = _statistics(width, activations, device, ranks, damping, f"{name}down")
    down = prune({"down": _rows(dense.down, ranks)}, hidden)["down"]
    return Solution(replace(iterate, down=ranks.gather_rows(down, outputs)), inputs, hidden, [], [])


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
    fitted_chunks: int | None = None,
    weights: Tensor | None = None,
    auxiliary_dtype: torch.dtype = torch.float32,
    storage: torch.device | None = None,
    step: Entrywise | None = None,
    name: str = "",
    on_iteration: Callable[[int, float], None] | None = None,
) -> Solution:
    """Minimise ``β‖Y − p W_dᵀ‖² + γ‖p − φ(s) ⊙ z‖² + α(‖z − X W_uᵀ‖² + ‖s − X W_gᵀ‖²)`` with every W in its pattern.

    The auxiliaries ``z`` and ``s`` start at the dense block's values. One iteration:

    1. up and gate: regress ``z`` and ``s`` on X, ``Ŵ = W + (zᵀX − W XᵀX)(XᵀX + λI)⁻¹`` around the dense W, then prune Ŵ.
    2. down: regress Y on the hidden activation ``h = φ(X W_gᵀ) ⊙ X W_uᵀ`` of the pruned gate and up, then prune. This takes
       ``p = h`` in the weight step, so the down projection minimises the true error. With ``scale_free=False`` the regression
       is on the auxiliary ``p``, as in the paper.
    3. Measure ``‖Y − h W_dᵀ‖² / ‖Y‖²`` on the held-out tokens, or on the fitted ones if none are held out. Keep the iterate if
       it is the best so far.
    4. ``p = q + (Y − q W_dᵀ) K W_d`` with ``q = φ(s) ⊙ z`` and ``K = (W_d W_dᵀ + γ/β I)⁻¹``. Then z, then s
       (:mod:`~sparsellm_lightning.solvers.activations`).

    The first iteration skips the regressions, so it is the local solver (:func:`solve_locally`). On the tokens of step 3, the
    result is never worse than the local solver's.

    The regressions' λ is ``max(damping, 2 · columns / tokens)`` of the mean diagonal, for up and gate with the number of all
    fitted tokens, for down with that of the tokens that its iteration sees. With few tokens per column, a smaller λ would fit
    the noise of the calibration text.

    ``zᵀX`` is computed as ``(z − m)ᵀX + W_i XᵀX``, where ``m = X W_iᵀ`` is the pre-activation of the current weights. Only the
    small correction ``z − m`` is summed over tokens, so ``auxiliary_dtype`` may be coarse.

    Only Gram and cross matrices travel between ranks. z and s stay where their tokens are. Every rank prunes its own rows,
    which are then gathered.

    Args:
        dense: the dense block, whole, float32.
        x: its input, (n, d), this rank's tokens, any dtype. Products are float32. n may be 0 on some ranks.
        y: its target output, (n, d), any dtype. x and y may lie on the host while the weights lie on an accelerator.
        prune: see :data:`Prune`.
        iterations: at least 1.
        penalties: α, β, γ.
        damping: of the Gram matrices, for the local solver.
        ranks: the data-parallel ranks.
        chunks: tokens per step, summing to n. None: ``CHUNK`` each. With one chunk per calibration window the result does not
            depend on which rank has which window.
        leading_chunks: number of chunks whose tokens have auxiliaries. Iterations between the first and the last see only these
            tokens; without held-out tokens, only the first and the last iterate are then candidates for the result. None: all.
        fitted_chunks: number of chunks that are fitted. The tokens of the others are held out. None: all.
        weights: (n,) float32, of each token's squared error, such as the squared weights that a router gives. None: 1.
        auxiliary_dtype: of z, s, their predictions, and the products that update p, z and s. Gram matrices, h and errors are
            float32.
        storage: device where z and s are kept between uses. None: the weights' device.
        step: :func:`~sparsellm_lightning.solvers.activations.preactivation_step` of the block, or a compiled form of it.
        name: prefix of projection names in messages.
        on_iteration: called with (iteration, error).

    Raises:
        NumericalError: NaN or infinity in X, Y or h, or a factorisation that fails with the largest damping.
    """
    device = dense.up.device
    if step is None:
        step = partial(in_slices, preactivation_step(dense.activation, dense.gate is not None, dense.up_bounds))
    tokens = Tokens(x, y, dense.down_bias, chunks, device, weights)
    fitted_chunks = len(tokens.sizes) if fitted_chunks is None else fitted_chunks
    fitted, held_out = tokens.part(0, fitted_chunks), tokens.part(fitted_chunks)
    leading = fitted if leading_chunks is None else fitted.part(0, leading_chunks)
    width, outputs = dense.up.shape[0], dense.down.shape[0]

    energies = fitted.energies(ranks)
    check_finite(energies, f"{name}down", "target output")
    _, held_out_energy, held_out_count = held_out.energies(ranks).tolist()
    leading_energies = energies if leading is fitted else leading.energies(ranks)
    inputs = _statistics(
        x.shape[1],
        (scaled(x_c, root) for x_c, _, _, root in fitted),
        device,
        ranks,
        damping,
        f"{name}{dense.first_layers[0]}",
    )

    auxiliaries: Auxiliaries | None = None
    of_p: tuple[InputStatistics, Tensor] | None = None  # statistics of p, only for the raw objective
    targets = {layer: _rows(getattr(dense, layer), ranks) for layer in dense.first_layers}
    best: tuple[FeedForward, Tensor] | None = None
    best_error = float("inf")
    errors: list[float] = []
    held_out_errors: list[float] = []
    for iteration in range(iterations):
        last = iteration + 1 == iterations
        if last and auxiliaries is not None:
            auxiliaries.clear()
        pruned = prune(targets, inputs)
        first: dict[str, Any] = {layer: ranks.gather_rows(rows, width) for layer, rows in pruned.items()}
        iterate = replace(dense, **first)
        seen, seen_energies = (
            (fitted, energies) if last or iteration == 0 or leading is fitted else (leading, leading_energies)
        )
        gram, cross = _sum_hidden(iterate, seen, ranks)
        check_finite(gram, f"{name}down")
        # The statistics are dropped with their factors before the next iteration makes its own.
        counted = seen_energies if of_p is None else leading_energies  # p is known of the leading tokens alone
        ridge = None if auxiliaries is None else _ridge(damping, width, int(counted[2]))
        of_down = of_p or (InputStatistics(gram, damping, f"{name}down"), cross)
        down = _prune_down(dense.down, *of_down, ridge, prune, ranks)
        del of_down
        iterate = replace(iterate, down=ranks.gather_rows(down, outputs))

        error = _error(down, _rows(cross, ranks), gram, seen_energies, ranks)
        errors.append(error)
        if on_iteration is not None:
            on_iteration(iteration, error)
        if held_out_count:
            held_out_errors.append(squared_error(iterate, held_out, ranks) / (held_out_energy or 1.0))
        criterion = held_out_errors[-1] if held_out_count else error if seen is fitted else float("inf")
        if best is None or criterion < best_error:
            best, best_error = (iterate, gram), criterion
        if last or (error == 0 and seen is fitted):
            break
        if auxiliaries is None:
            auxiliaries = Auxiliaries(
                dense, leading, penalties or Penalties(), damping, ranks, auxiliary_dtype, storage or device, step
            )
        corrections, of_p = auxiliaries.update(iterate)
        targets = _regress(dense, iterate, corrections, inputs, _ridge(damping, x.shape[1], int(energies[2])), ranks)
    assert best is not None
    return Solution(best[0], inputs, InputStatistics(best[1], damping, f"{name}down"), errors, held_out_errors)


def _statistics(
    columns: int, parts: Iterable[Tensor], device: torch.device, ranks: Ranks, damping: float, name: str
) -> InputStatistics:
    gram = Gram(columns, device)
    for part in parts:
        gram.add(part)
    return gram.statistics(damping, ranks, name)


def _sum_hidden(iterate: FeedForward, tokens: Tokens, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """``hᵀh / n`` and ``Yᵀh / n`` over tokens of all ranks."""
    width, device = len(iterate.up), iterate.up.device
    gram, cross = Gram(width, device), Cross(len(iterate.down), width, device)
    for x_c, y_c, _, root in tokens:
        h = scaled(iterate.hidden(x_c), root)
        gram.add(h)
        cross.add(scaled(y_c, root), h)
    return gram.mean(ranks), cross.mean(ranks)


def _prune_down(
    dense: Tensor, inputs: InputStatistics, cross: Tensor, ridge: float | None, prune: Prune, ranks: Ranks
) -> Tensor:
    """This rank's rows of the pruned down projection, around ``W + (YᵀH − W HᵀH)(HᵀH + λI)⁻¹`` for the dense W.

    Args:
        dense: W, (d, f).
        inputs: ``HᵀH / n``.
        cross: ``YᵀH / n``, (d, f).
        ridge: λ, as a fraction of the mean diagonal. None: no regression, the pruned weight is around W.
        prune: see :data:`Prune`.
        ranks: the data-parallel ranks.
    """
    target = dense
    if ridge is not None:
        count(2 * dense.numel() * len(inputs.gram))
        target = dense + inputs.with_damping(ridge).factor.solve(cross - dense @ inputs.gram)
    return prune({"down": _rows(target, ranks)}, inputs)["down"]


def _regress(
    dense: FeedForward,
    iterate: FeedForward,
    corrections: dict[str, Tensor],
    inputs: InputStatistics,
    ridge: float,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """This rank's rows of ``W + (zᵀX − W XᵀX)(XᵀX + λI)⁻¹``, and of the same for s.

    Args:
        corrections: ``(z − m)ᵀX / n`` and ``(s − m)ᵀX / n``, by layer.
        ridge: λ, as a fraction of the mean diagonal.
    """
    regression = inputs.with_damping(ridge).factor
    targets = {}
    for layer, correction in corrections.items():
        # Every rank computes all rows, because the rounding of a product depends on its shape.
        weight = getattr(dense, layer)
        count(2 * weight.numel() * weight.shape[1])
        wanted = correction + (getattr(iterate, layer) - weight) @ inputs.gram
        targets[layer] = _rows(weight + regression.solve(wanted), ranks)
    return targets


def _error(down: Tensor, cross: Tensor, gram: Tensor, energies: Tensor, ranks: Ranks) -> float:
    """``‖Y − h Wᵀ‖² / ‖Y‖²`` as ``‖Y‖² − 2⟨W, Yᵀh⟩ + ⟨W hᵀh, W⟩``, without another pass over the tokens."""
    target_energy, y_energy, tokens = map(float, energies)
    count(2 * down.numel() * len(gram))
    explained = ((2 * cross - down @ gram) * down).sum(dtype=torch.float64)
    ranks.sum_(explained)
    return max(target_energy - tokens * float(explained), 0.0) / (y_energy or 1.0)


def _ridge(damping: float, columns: int, tokens: int) -> float:
    """Damping of a regression, ``argmin_Ŵ ‖T − XŴᵀ‖² + λ‖Ŵ − W‖² = W + (T − XWᵀ)ᵀX (XᵀX + λI)⁻¹``."""
    return max(damping, 2 * columns / max(tokens, 1))


def _rows(matrix: Tensor, ranks: Ranks) -> Tensor:
    return matrix[ranks.local_rows(matrix.shape[0])]
