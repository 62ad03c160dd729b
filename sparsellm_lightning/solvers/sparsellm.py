"""The SparseLLM alternation (Bai et al., arXiv 2402.17946): the matrices of a feed-forward block solved together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparsellm_lightning.placement import Placement, Shelf
from sparsellm_lightning.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.activations import Entrywise, in_slices, preactivation_step
from sparsellm_lightning.solvers.auxiliaries import Auxiliaries, Pair, Penalties
from sparsellm_lightning.solvers.feed_forward import CHUNK, FeedForward, Tokens, change_of_output, squared_error
from sparsellm_lightning.solvers.local import InputStatistics
from sparsellm_lightning.statistics import Cross, Gram, check_finite, factorize
from sparsellm_lightning.stopwatch import count


@dataclass(frozen=True)
class Solution:
    """Result of :func:`solve_feed_forward`.

    Args:
        feed_forward: the best iterate's weights, whole on every rank.
        errors: ``‖Y − FFN(X)‖² / ‖Y‖²`` after each iteration, over all ranks' fitted tokens (those between the first and the
            last over the leading ones); the first is the local solver's.
        held_out_errors: the same over the tokens held out; empty without any.
        inputs, hidden: statistics of X, and of the hidden activation that the best iterate produces, over the fitted tokens.
        change: ``FFN(X) − Y`` of the best iterate, (n, d), in the dtype and place of Y.
    """

    feed_forward: FeedForward
    errors: list[float]
    held_out_errors: list[float]
    inputs: InputStatistics
    hidden: InputStatistics
    change: Tensor


Prune = Callable[[dict[str, Tensor], InputStatistics], dict[str, Tensor]]


@torch.no_grad()
def solve_locally(
    dense: FeedForward,
    x: Tensor,
    prune: Prune,
    *,
    damping: float = 0.01,
    ranks: Ranks = SINGLE,
    chunks: Sequence[int] | None = None,
    kept: Shelf | None = None,
    name: str = "",
) -> tuple[FeedForward, InputStatistics, InputStatistics]:
    """Prune up and gate on X, then down on the hidden activation that these, pruned, give.

    Args:
        dense: the dense block, whole, float32.
        x: its input, (n, d), this rank's fitted tokens, any dtype and device.
        prune, damping, ranks, chunks, name: as of :func:`solve_feed_forward`.
        kept: where to keep the hidden activation, by chunk.

    Returns:
        the pruned block, whole on every rank; the statistics of X, and of the hidden activation.

    Raises:
        NumericalError: NaN or infinity in X or the hidden activation.
    """
    device, first = dense.up.device, ["up"] if dense.gate is None else ["gate", "up"]
    width, outputs = dense.up.shape[0], dense.down.shape[0]
    parts = x.split([len(part) for part in x.split(CHUNK)] if chunks is None else list(chunks))
    inputs = _statistics(x.shape[1], parts, device, ranks, damping, f"{name}up")
    check_finite(inputs.gram, f"{name}{first[0]}")
    pruned = prune({layer: _rows(getattr(dense, layer), ranks) for layer in first}, inputs)
    whole = {layer: ranks.gather_rows(pruned[layer], width) for layer in first}
    iterate = replace(dense, up=whole["up"], gate=whole.get("gate"))

    def hidden_activations() -> Iterator[Tensor]:
        for index, x_c in enumerate(parts):
            h = iterate.hidden(x_c.to(device, torch.float32))
            if kept is not None:
                kept.put(index, h)
            yield h

    hidden = _statistics(width, hidden_activations(), device, ranks, damping, f"{name}down")
    check_finite(hidden.gram, f"{name}down")
    down = prune({"down": _rows(dense.down, ranks)}, hidden)["down"]
    return replace(iterate, down=ranks.gather_rows(down, outputs)), inputs, hidden


def _statistics(
    columns: int, parts: Iterable[Tensor], device: torch.device, ranks: Ranks, damping: float, name: str
) -> InputStatistics:
    gram = Gram(columns, device)
    for part in parts:
        gram.add(part.to(device, torch.float32))
    return InputStatistics(gram.mean(ranks), damping, name)


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
    auxiliary_dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
    step: Entrywise | None = None,
    reuse_target: bool = False,
    name: str = "",
    on_iteration: Callable[[int, float], None] | None = None,
) -> Solution:
    """Minimise ``β‖Y − p W_dᵀ‖² + γ‖p − φ(s) ⊙ z‖² + α(‖z − X W_uᵀ‖² + ‖s − X W_gᵀ‖²)`` with every W in its pattern.

    The auxiliary ``z``, ``s`` start at the dense block's values. One iteration:

    1. up and gate: regress ``z`` and ``s`` on X, ``Ŵ = W + (zᵀX − W XᵀX)(XᵀX + λI)⁻¹`` around the dense W, then prune Ŵ.
    2. down: the same from the hidden activation ``h = φ(X W_gᵀ) ⊙ X W_uᵀ`` which the pruned layers really give, towards
       Y. This takes ``p = h`` in the weight step, so the iterate's down projection minimises the true error; with
       ``scale_free=False`` the auxiliary ``p`` is used, as in the paper.
    3. measure ``‖Y − h W_dᵀ‖² / ‖Y‖²`` and keep the iterate if it is the best so far: on the held-out tokens where there are
       any, otherwise on the fitted ones.
    4. ``p = q + (Y − q W_dᵀ) K W_d`` with ``q = φ(s) ⊙ z``, ``K = (W_d W_dᵀ + γ/β I)⁻¹``; then z, then s, in closed form or
       to a tolerance (:mod:`~sparsellm_lightning.solvers.activations`).

    The first iteration skips the regressions: it is exactly the local solver, each layer calibrated after the one before
    it is pruned (:func:`solve_locally`). So the result is never worse than that, on the tokens that choose.

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
            iterations between the first and the last; without held-out tokens, the better of these two is returned. None is
            all.
        fitted_chunks: the tokens of this rank's other chunks are held out: no weight is fitted to them. None is all.
        auxiliary_dtype: of z, s, their predictions, and the products that update p, z, s and the corrections above; the Gram
            matrices, h and the errors stay float32. See :func:`~sparsellm_lightning.products.coarse_dtype`.
        placement: where activations are kept; does not change the result. Everything on the weights' device by default.
        reuse_target: overwrite y with the change of output.
        step: :func:`~sparsellm_lightning.solvers.activations.preactivation_step` of the block, in a faster form.
        name: prefix of projection names in messages.
        on_iteration: called with (iteration, error).

    Raises:
        NumericalError: NaN or infinity in X, Y or h, or a factorisation that fails whatever the damping.
    """
    penalties = penalties or Penalties()
    device = dense.up.device
    placement = placement or Placement.everything_on(device)
    if step is None:
        step = partial(in_slices, preactivation_step(dense.activation, dense.gate is not None))
    tokens = Tokens(x, y, dense.down_bias, chunks, device)
    fitted_chunks = len(tokens.sizes) if fitted_chunks is None else fitted_chunks
    fitted, held_out = tokens.part(0, fitted_chunks), tokens.part(fitted_chunks)
    leading = fitted if leading_chunks is None else fitted.part(0, leading_chunks)
    first = ["up"] if dense.gate is None else ["gate", "up"]
    width, outputs = dense.up.shape[0], dense.down.shape[0]

    energies = fitted.energies(ranks)
    check_finite(energies, f"{name}down", "target output")
    _, held_out_energy, held_out_count = held_out.energies(ranks).tolist()
    out = y if reuse_target else None
    if iterations == 1:
        kept = Shelf(x.dtype, device) if placement.hidden else None
        local, inputs, hidden = solve_locally(
            dense, fitted.x, prune, damping=damping, ranks=ranks, chunks=fitted.sizes, kept=kept, name=name
        )
        change, squares = change_of_output(local, tokens, fitted_chunks, ranks, out, kept)
        errors = [float(squares[0]) / (float(energies[1]) or 1.0)]
        held_out_errors = [float(squares[1]) / (held_out_energy or 1.0)] if held_out_count else []
        if on_iteration is not None:
            on_iteration(0, errors[0])
        return Solution(local, errors, held_out_errors, inputs, hidden, change)

    inputs = _statistics(x.shape[1], (x_c for x_c, _, _ in fitted), device, ranks, damping, f"{name}up")
    check_finite(inputs.gram, f"{name}{first[0]}")
    leading_energies = energies if leading is fitted else leading.energies(ranks)
    auxiliaries: Auxiliaries | None = None
    predictions = Pair.on(device, auxiliary_dtype) if placement.predictions else None
    targets = {layer: _rows(getattr(dense, layer), ranks) for layer in first}
    best: tuple[FeedForward, Tensor] | None = None
    best_error = float("inf")
    errors, held_out_errors = [], []
    for iteration in range(iterations):
        last = iteration + 1 == iterations
        if last and auxiliaries is not None:
            auxiliaries.values.clear()
        if last and predictions is not None:
            predictions.clear()
        pruned = prune(targets, inputs)
        targets = {}  # their memory is wanted
        whole = {layer: ranks.gather_rows(pruned[layer], width) for layer in first}
        iterate = replace(dense, up=whole["up"], gate=whole.get("gate"))
        seen = fitted if last or iteration == 0 else leading
        seen_energies = energies if seen is fitted else leading_energies
        gram, cross = _sum_hidden(iterate, seen, ranks, predictions, 0 if last else len(leading.sizes))
        check_finite(gram, f"{name}down")
        seen_tokens = int(seen_energies[2])
        down = _prune_down(dense, gram, cross, auxiliaries, prune, damping, seen_tokens, ranks, f"{name}down")
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
        del gram  # large, and the best one's is in best
        if last or (error == 0 and seen is fitted):
            break
        if auxiliaries is None:
            auxiliaries = Auxiliaries(dense, leading, penalties, damping, ranks, auxiliary_dtype, placement, step)
        ridge = _ridge(damping, x.shape[1], int(energies[2]))
        targets = _regress(dense, iterate, auxiliaries.update(iterate, predictions), inputs, ridge, ranks)
    assert best is not None
    change, _ = change_of_output(best[0], tokens, fitted_chunks, ranks, out)
    return Solution(best[0], errors, held_out_errors, inputs, InputStatistics(best[1], damping, f"{name}down"), change)


def _sum_hidden(
    iterate: FeedForward,
    tokens: Tokens,
    ranks: Ranks,
    predictions: Pair | None,
    predicted: int,
) -> tuple[Tensor, Tensor]:
    """``hᵀh / n`` and ``Yᵀh / n`` over some tokens of all ranks; keep what is predicted for z and s of so many chunks."""
    width, device = len(iterate.up), iterate.up.device
    gram, cross = Gram(width, device), Cross(len(iterate.down), width, device)
    for index, (x_c, y_c, _) in enumerate(tokens):
        z, s = iterate.preactivations(x_c)
        h = iterate.combine(z, s)
        gram.add(h)
        cross.add(y_c, h)
        if predictions is not None and index < predicted:
            predictions.put(index, z, s)
    return gram.mean(ranks), cross.mean(ranks)


def _prune_down(
    dense: FeedForward,
    gram: Tensor,
    cross: Tensor,
    auxiliaries: Auxiliaries | None,
    prune: Prune,
    damping: float,
    tokens: int,
    ranks: Ranks,
    name: str,
) -> Tensor:
    """This rank's rows of W_d, pruned: at first around the dense ones, once there are auxiliaries around their regression.

    Args:
        gram, cross: ``hᵀh / n`` and ``Yᵀh / n`` over so many tokens.
    """
    inputs, target = InputStatistics(gram, damping, name), dense.down
    if auxiliaries is not None:
        if auxiliaries.keep_p:
            inputs, cross = auxiliaries.down_statistics()
        ridge = _ridge(damping, len(gram), tokens)
        correction = cross - target @ inputs.gram
        count(2 * dense.down.numel() * len(gram))
        target = target + factorize(inputs.gram, ridge, inputs.name).solve(correction)
    return prune({"down": _rows(target, ranks)}, inputs)["down"]


def _regress(
    dense: FeedForward,
    iterate: FeedForward,
    corrections: dict[str, Tensor],
    inputs: InputStatistics,
    ridge: float,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """This rank's rows of ``W + (zᵀX − W XᵀX)(XᵀX + λI)⁻¹``, and of the same of s, from ``(z − m)ᵀX``."""
    regression = inputs.with_damping(ridge).factor
    targets = {}
    for layer, correction in corrections.items():
        # Of all rows on every rank: how a product rounds depends on its shape.
        weight = getattr(dense, layer)
        count(2 * weight.numel() * weight.shape[1])
        wanted = correction + (getattr(iterate, layer) - weight) @ inputs.gram
        targets[layer] = _rows(weight + regression.solve(wanted), ranks)
    return targets


def _error(down: Tensor, cross: Tensor, gram: Tensor, energies: Tensor, ranks: Ranks) -> float:
    """``‖Y − h Wᵀ‖² / ‖Y‖²`` by ``‖Y‖² − 2⟨W, Yᵀh⟩ + ⟨W hᵀh, W⟩``, over rows of W: no further pass over the tokens."""
    target_energy, y_energy, tokens = map(float, energies)
    count(2 * down.numel() * len(gram))
    explained = ((2 * cross - down @ gram) * down).sum(dtype=torch.float64)
    ranks.sum_(explained)
    return max(target_energy - tokens * float(explained), 0.0) / (y_energy or 1.0)


def _ridge(damping: float, columns: int, tokens: int) -> float:
    """Damping of a regression on so many columns: ``argmin_Ŵ ‖T − XŴᵀ‖² + λ‖Ŵ − W‖² = W + (T − XWᵀ)ᵀX (XᵀX + λI)⁻¹``."""
    return max(damping, 2 * columns / max(tokens, 1))


def _rows(matrix: Tensor, ranks: Ranks) -> Tensor:
    return matrix[ranks.local_rows(matrix.shape[0])]
