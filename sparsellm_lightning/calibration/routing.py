"""The tokens of each expert of a mixture, with the weight that the router gives them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsellm_lightning.architecture import Block, Experts, Routing
from sparsellm_lightning.calibration.activations import ActivationCache, chunks_in
from sparsellm_lightning.calibration.context import Context
from sparsellm_lightning.calibration.forward import observe_routing
from sparsellm_lightning.solvers import moved


@dataclass(frozen=True)
class ExpertTokens:
    """This rank's tokens of one expert.

    Args:
        x: (n, d).
        weights: (n,) float32, of each token's squared error. Their mean over all ranks' fitted tokens is 1.
        chunks: tokens of each chunk, which lie in one window.
        fitted_chunks: number of chunks that are fitted: the first ones.
        fitted_windows: tokens of each window that is fitted. Some may be empty.
        borrows: whether the statistics are partly those of all tokens.
    """

    x: Tensor
    weights: Tensor
    chunks: list[int]
    fitted_chunks: int
    fitted_windows: list[int]
    borrows: bool

    def fitted(self) -> ExpertTokens:
        """The fitted tokens only."""
        chunks = self.chunks[: self.fitted_chunks]
        tokens = sum(chunks)
        return replace(self, x=self.x[:tokens], weights=self.weights[:tokens], chunks=chunks)

    def chunks_of(self, windows: int) -> int:
        """Number of chunks in the first ``windows`` windows."""
        return len(chunks_in(self.fitted_windows[:windows]))


class RoutedTokens:
    """What the router of a block decides for this rank's calibration tokens.

    With w_t the weight of an expert's output for token t, the squared error of the mixture is, up to products of the errors of
    different experts, ``Σ_t w_t² ‖E(x_t) − Ê(x_t)‖²``. So a token counts ``w_t²`` times.

    Args:
        context: of the run. All ranks make one together.
        block: with its current weights.
        cache: activations in front of the block.
        experts: of the block.
    """

    def __init__(self, context: Context, block: Block, cache: ActivationCache, experts: Experts) -> None:
        self.context, self.experts, self.fitted_windows = context, experts, cache.fitted
        self.lengths: list[int] = []  # of the windows, which may be none
        windows: list[list[Tensor]] = []

        def see(routing: Routing) -> None:
            if routing.chosen is None:  # each expert has every token, but those of others are zero
                windows.append([routing.hidden.to_sparse(2).to(cache.storage)])
            else:
                assert routing.weights is not None
                tensors = (routing.hidden, routing.chosen, routing.weights)
                windows.append([moved(t.clone(), cache.storage) for t in tensors])
            self.lengths.append(windows[-1][0].shape[-2])

        observe_routing(context, block, cache, experts, see)
        self.routing = Routing(*(_joined(tensors) for tensors in zip(*windows, strict=True))) if windows else None

    def of(self, expert: int, borrowing_below: int) -> ExpertTokens:
        """The tokens that are routed to an expert.

        An expert with n < m fitted tokens over all ranks, m being ``borrowing_below``, borrows the statistics of all tokens:
        its Gram matrices become ``n/m`` times its own plus ``1 − n/m`` times those of all tokens. Where the router's weight
        multiplies an expert's input, as in Llama 4, the input of other tokens is zero, and an expert has its own alone; without
        any it is pruned by magnitude.
        """
        device = self.context.device
        if self.routing is None:
            features = self.experts.networks[expert].roles["up"].shape[1]
            x, weight = torch.empty(0, features, device=device), torch.empty(0, device=device)
        else:
            x, weight = self.routing.of(expert)
        square = weight.float().square()
        chosen = square > 0
        # By window, so that the result does not depend on which rank has which; read from the device once.
        by_window = zip(square.split(self.lengths), chosen.split(self.lengths), strict=True)
        sums = [torch.stack([w.sum(), some.sum()]).double() for w, some in by_window]
        found = torch.stack(sums).cpu() if sums else torch.empty(0, 2, dtype=torch.float64)
        fitted = slice(self.fitted_windows)
        totals = torch.cat([found[fitted].sum(0), found.new_tensor([sum(self.lengths[fitted])])]).to(device)
        self.context.ranks.sum_(totals)
        energy, routed, every = totals.tolist()
        own = min(routed / borrowing_below, 1.0) if energy > 0 else 0.0
        nothing_to_borrow = energy > 0 and self.routing is not None and self.routing.chosen is None
        borrows, lengths = own < 1.0 and not nothing_to_borrow, self.lengths
        if borrows:
            weight = own * every * square / max(energy, 1e-30) + (1 - own)
        else:
            lengths = [int(number) for number in found[:, 1]]
            x, weight = x[chosen], square[chosen] * (routed / energy)
        fitted_chunks = len(chunks_in(lengths[fitted]))
        return ExpertTokens(x, weight.to(device), chunks_in(lengths), fitted_chunks, lengths[fitted], borrows)


def _joined(batches: tuple[Tensor, ...]) -> Tensor:
    """Along tokens. A router that does not choose equally many experts for each token gives batches of unequal widths."""
    widest = max(tensor.shape[-1] for tensor in batches)
    # Expert 0 with weight 0: not routed there.
    return torch.cat([pad(t, (0, widest - t.shape[-1])) if t.shape[-1] < widest else t for t in batches], -2)
