"""What pruning a model will take: floating-point operations by phase, and bytes, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from sparsellm_lightning.architecture import Block, DecoderLayout, Experts, Linears
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.models import size_of_sample
from sparsellm_lightning.pipeline.block import ALTERNATION_TOKENS
from sparsellm_lightning.pipeline.kept import STEP_TOKENS, activations_of_tuning, memory_of_tuning
from sparsellm_lightning.runtime import Sizes


@dataclass(frozen=True)
class Estimate:
    """What a run takes on one device.

    Args:
        operations: floating-point operations by phase, as :class:`~sparsellm_lightning.PruningReport` names them, without
            ``allocation``, ``importance`` and ``generation``.
        sizes: bytes besides the model while a block is solved.
        distillation: bytes besides the model at the end: gradients, vectors of the kept weights, and activations. 0 without it.
    """

    operations: dict[str, float]
    sizes: Sizes
    distillation: float


def estimate_work(layout: DecoderLayout, config: PruningConfig, tokens: int, window: int) -> Estimate:
    """What pruning takes.

    Args:
        layout: the model's blocks.
        config: settings.
        tokens: of all calibration windows.
        window: tokens of one window.
    """
    operations = {"forward": 0.0, "statistics": 0.0, "local_solve": 0.0, "alternation": 0.0, "reconstruction": 0.0}
    alternating = config.alternates_in(len(layout.blocks))
    # Tokens for which the dense blocks' outputs are computed: all for the alternation, otherwise those that tuning uses.
    followed = 0.0
    if alternating and config.target == "model":
        followed = tokens
    elif config.reconstruction_steps:
        step = max(STEP_TOKENS, window)
        followed = min(config.reconstruction_steps * step + config.held_out_fraction * tokens, tokens)
    for block in layout.blocks:
        work_of_block = _of_block(block, config, tokens, window, block.index in alternating)
        work_of_block["forward"] += block.forward_work(window) * followed
        for phase, work in work_of_block.items():
            operations[phase] += work
    memory = 0.0
    if config.distillation_steps:
        head = layout.model.get_output_embeddings()
        seen = config.distillation_steps * min(max(STEP_TOKENS, window), tokens)
        forward = sum(block.forward_work(window) for block in layout.blocks)
        head_work = 0.0
        if head is not None:
            vocabulary, width = head.weight.shape
            head_work = 6.0 * size_of_sample(vocabulary) * width
        operations["distillation"] = seen * (3.0 * forward + head_work)
        memory = sum(memory_of_tuning(layout.blocks, config))
        windows = max(min(STEP_TOKENS, tokens) // window, 1)
        memory += activations_of_tuning(layout, windows, min(window, tokens))
    done = {phase: work for phase, work in operations.items() if work}
    auxiliary_tokens = min(tokens, ALTERNATION_TOKENS * layout.widest[1]) if alternating and config.alternates else 0
    return Estimate(done, sizes_of_block(layout, config, tokens, auxiliary_tokens), memory)


def _of_block(block: Block, config: PruningConfig, tokens: int, window: int, alternates: bool) -> dict[str, float]:
    whole = block.forward_work(window)
    passes = whole * (1 + alternates)  # the pruned block, the networks' inputs and outputs
    replayed = 0 if block.replay is None else block.forward_work(window, until=block.replay.last.module)
    work = dict.fromkeys(("statistics", "local_solve", "alternation"), 0.0)
    for unit in block.units:
        until = block.forward_work(window, until=unit.observed)
        passes += until - replayed if until > replayed else until
        share = unit.share if isinstance(unit, Experts) else 1.0
        if isinstance(unit, Linears):
            columns = unit.projections[0].shape[1]
            work["statistics"] += tokens * columns**2
            work["local_solve"] += columns**3 + sum(2 * p.size * columns for p in unit.projections)
        for network in unit.networks:
            columns, width = network.first[0].shape[1], network.roles["down"].shape[1]
            seen = tokens * share if tokens * share >= width else tokens  # with fewer an expert borrows those of others
            local = columns**3 + width**3 + sum(2 * p.size * p.shape[1] for p in network.projections)
            weights = sum(p.size for p in network.projections)
            statistics = seen * (columns**2 + width**2 + 2 * (weights - network.roles["down"].size))
            iterations = config.num_iterations if alternates else 1
            carrying = min(seen, ALTERNATION_TOKENS * width)
            work["alternation" if alternates else "statistics"] += statistics
            work["local_solve"] += iterations * local
            # An update: predictions, the residual, p, and the cross matrices.
            work["alternation"] += (iterations - 1) * carrying * (6 * weights + width**2)
    work["forward"] = passes * tokens
    work["reconstruction"] = 3.0 * whole * config.reconstruction_steps * min(max(STEP_TOKENS, window), tokens)
    return work


def sizes_of_block(
    layout: DecoderLayout,
    config: PruningConfig,
    tokens: int,
    auxiliary_tokens: int,
    itemsize: int = 4,
    auxiliary_itemsize: int = 4,
) -> Sizes:
    """Bytes that solving a block holds on a rank, besides the model.

    Args:
        layout: the model's blocks.
        config: settings.
        tokens: of the rank's calibration windows.
        auxiliary_tokens: of them, those that carry auxiliary variables.
        itemsize: bytes of an entry of the hidden states.
        auxiliary_itemsize: bytes of an entry of the auxiliary variables.
    """
    dim, width = layout.widest
    matrices = 3 if any("gate" in network.roles for network in layout.networks) else 2
    # Input and output of the block and of its feed-forward network, and the input of its last attention projection; the goal;
    # the dense model's activations.
    copies = 5 + 2 * bool(config.reconstruction_steps) + 2 * (config.target == "model")
    return Sizes(
        # Float32: dense, best, current and rounded weights, targets. Of each Gram matrix the float64 sum, a damped copy and the
        # factor; in float32 the mean, the best iterate's, and factors.
        work=5 * 4 * matrices * dim * width + (44 if auxiliary_tokens else 36) * width * width,
        activations=copies * tokens * dim * itemsize,
        auxiliaries=(matrices - 1) * auxiliary_tokens * width * auxiliary_itemsize,
    )
