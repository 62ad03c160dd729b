"""The settings, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, SupportsFloat

import numpy as np

from sparsellm_lightning.config.checks import (
    BLOCK_CHOICES,
    LEAST,
    check_pattern,
    check_settings,
    integer,
    one_of,
    parse_nofm,
)
from sparsellm_lightning.config.presets import (
    BUDGETS,
    PRESETS,
    STRUCTURES,
    Allocation,
    LocalSolverName,
    Method,
    Precision,
    Preset,
    Target,
    preset_settings,
)
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import SINGLE, NofM, Pattern, Penalties, Ranks, Unstructured


@dataclass(frozen=True)
class PruningConfig:
    """Settings of the pruner. Settings that a preset decides are None until construction replaces None by the preset's value.

    Args:
        sparsity: fraction of zeros, in [0, 1): in each pruned matrix with allocation ``uniform``, otherwise over all pruned
            matrices. Pattern ``neurons``, ``heads`` or ``blocks``: fraction of units, heads or blocks to remove. None: 0.5, or
            the sparsity of an N:M pattern.
        pattern: ``unstructured``; N:M written kept:group, such as ``2:4``, ``4:8``, ``1:4``. Or a structure to remove, so that
            a smaller dense model is exported: ``neurons``: hidden units of the feed-forward networks, equally many in every
            block; ``heads``: key-value heads with the query heads that use them, equally many in every block (query heads, if
            all share one key-value head); ``blocks``: decoder blocks whose removal changes the model's output least. Or several
            of these with their shares, such as ``{neurons: 0.25, heads: 0, blocks: 3}`` (blocks as a share or a number). Or a
            budget: the share to keep of the parameters of the decoder blocks' projections, ``{parameters: 0.7}``, or of the
            blocks' time in a forward over one calibration batch, ``{latency: 0.7}``, divided over units, heads and blocks so
            that the estimated divergence of the model's output is least.
        round_to: the number of hidden units that are kept is a multiple of it.
        preset: values for the settings from ``method`` to ``damping``. ``paper``: SparseLLM, with the differences that
            ``solvers/README.md`` lists. ``fast``: SparseGPT and reconstruction. ``balanced``: ADMM, sparsity by block,
            reconstruction, distillation. ``best``: sparsity by projection, more of both, and windows that the model
            writes; more accurate on text unlike the calibration text. For more than 32 calibration windows their steps grow
            in proportion. A setting that is given wins over the preset. If not given, ``allocation`` is uniform for every
            pattern but ``unstructured``, and ``target`` is ``model`` if blocks may be removed and reconstruction is on, and
            ``block`` if nothing fits a target.
        method: ``sparsellm`` (feed-forward networks by the alternation, other projections by ``local_solver``), or one local
            solver for all projections: ``admm``, ``sparsegpt``, ``wanda``, ``magnitude``.
        local_solver: solver inside ``sparsellm``: of the alternation's weight steps, and of every projection outside it.
        num_iterations: iterations of the alternation. The first is the local solver.
        target: output that alternation and reconstruction fit. ``block``: the dense block's (for the alternation: its
            feed-forward network's) on the pruned model's activations. ``model``: the dense model's output at this block, so
            that each block also corrects the error of the blocks before it. Experts are alternated towards their own output.
        allocation: how the sparsity is divided, its mean being kept. ``uniform``: equal everywhere. ``owl``, ``atp``: published
            rules by block (arXiv 2310.05175, 2502.14770). ``kl``: by projection, from the measured KL divergence of the model's
            output when that projection alone is pruned. ``kl_blocks``: by block, likewise, in a fraction of the time.
            Unstructured patterns only.
        reconstruction_steps: Adam steps that tune each block's kept weights, norms and biases after its solve, with the mask
            fixed. The Fisher information of each feature of the block's output weights its error. 0: none.
        distillation_steps: Adam steps that tune all kept weights together at the end, on the dense model's next-token
            distributions over the fitted windows. A step has about 512 tokens, and at least one window on each rank. Memory:
            24 bytes for each kept weight (value, position, gradient, two moments, best state), plus all gradients if weights
            are sharded. If the preset sets the steps, they are skipped with a warning where the model has no language-model
            head or memory is too small. 0: none.
        continuations: number of windows that the dense model writes for each fitted calibration window without padding. In the
            first, the model continues every 32-token piece of the calibration window; in the others it continues random tokens
            of the vocabulary, which gives text of other kinds. The first 40 % of the distillation steps use the written
            windows. For the first half of the fitted windows, the blocks are also fitted to the last window written for each.
        damping: added to the diagonal of each Gram matrix, as a fraction of the diagonal's mean.
        alternation_blocks: blocks whose feed-forward network ``sparsellm`` solves by the alternation (the paper's Ω): ``all``,
            ``none``, ``first_half``, or block indices (negative ones count from the end). ``local_solver`` solves the others.
        penalties: weights α, β, γ of the alternation's objective, and whether they are scale-free.
        allocation_spread: largest difference between the sparsity of one block (``kl``: of one projection) and the mean. Values
            above (1 − sparsity) / 2 are lowered to it, for ``owl`` and ``atp`` also values above sparsity / 2. ``owl``: half of
            the difference between the largest and the smallest sparsity of a block.
        ignore: name patterns of projections that stay dense, shell-style, matched against the whole name or its tail
            (``down_proj``, ``layers.0.*``). Not with patterns that may remove blocks.
        num_calibration_samples: calibration windows, over all ranks.
        calibration_val_fraction: fraction of the calibration windows that are held out. No weight is fitted to them; iterates
            and tuned states are chosen on them. Rounded down to whole windows. Methods that choose nothing fit all
            windows.
        seed: of the choice of calibration windows, of continuations, of the order of tuning batches, and of sampled tokens.
        solver_precision: ``auto``: bfloat16 products where the hardware is faster at them: for the alternation's auxiliaries,
            and, if the model is float32, for tuning, forwards of blocks that are tuned, continuations and measurements of the
            output. Gram matrices and weight steps are never in bfloat16. ``float32``: no bfloat16 but the model's own dtype.
        memory: bytes that pruning may hold on each rank's device besides the model, or ``auto``: most of what is free. With
            less, an accelerator keeps auxiliaries, activations and Adam's moments in host memory, which is slower, and a preset
            goes without distillation if its gradients do not fit. Less than one block needs is refused.

    Raises:
        UserError: a value out of its range. The message says what to write instead.
    """

    sparsity: float | None = None
    pattern: dict[str, float] | str = "unstructured"
    round_to: int = 64
    preset: Preset = "balanced"
    method: Method = None  # type: ignore[assignment]
    local_solver: LocalSolverName = None  # type: ignore[assignment]
    num_iterations: int = None  # type: ignore[assignment]
    target: Target = None  # type: ignore[assignment]
    allocation: Allocation = None  # type: ignore[assignment]
    reconstruction_steps: int = None  # type: ignore[assignment]
    distillation_steps: int = None  # type: ignore[assignment]
    continuations: int = None  # type: ignore[assignment]
    damping: float = None  # type: ignore[assignment]
    alternation_blocks: str | list[int] = "all"
    penalties: Penalties = field(default_factory=Penalties)
    allocation_spread: float = 0.15
    ignore: Sequence[str] = ()
    num_calibration_samples: int = 128
    calibration_val_fraction: float = 0.125
    seed: int = 0
    solver_precision: Precision = "auto"
    memory: Literal["auto"] | int = "auto"

    def __post_init__(self) -> None:
        one_of("preset", self.preset, tuple(PRESETS))
        if isinstance(self.pattern, dict):
            plain = {name: n.item() if isinstance(n, np.generic) else n for name, n in self.pattern.items()}
            object.__setattr__(self, "pattern", plain)
        check_pattern(self)
        self._normalise()
        target_given = self.target is not None
        allocation_given = self.allocation is not None
        for name, value in preset_settings(self.preset, self.num_calibration_samples).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.pattern != "unstructured" and not allocation_given:  # the pattern fixes every sparsity
            object.__setattr__(self, "allocation", "uniform")
        if not target_given and not self.fits_target:
            object.__setattr__(self, "target", "block")
        if not target_given and "blocks" in self.removes and self.reconstruction_steps:
            object.__setattr__(self, "target", "model")  # only the dense model's output makes up for a removed block
        if isinstance(self.ignore, str):
            raise UserError(
                f"ignore must be a list of patterns, got the string {self.ignore!r}. Write ['{self.ignore}']."
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        check_settings(self)

    def _normalise(self) -> None:
        """Convert numbers of other types, such as NumPy's, to Python's, because JSON does not know them."""
        for name in ("sparsity", "damping", "allocation_spread", "calibration_val_fraction"):
            value = getattr(self, name)
            if isinstance(value, SupportsFloat):
                object.__setattr__(self, name, float(value))
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not (value is None and name in PRESETS[self.preset]):  # which is replaced by the preset's
                object.__setattr__(self, name, integer(name, value, least))
        object.__setattr__(self, "seed", integer("seed", self.seed))
        if isinstance(self.penalties, dict):  # as a report has them
            for name in self.penalties:
                one_of("penalties' names", name, [entry.name for entry in fields(Penalties)])
            object.__setattr__(self, "penalties", Penalties(**self.penalties))
        if not isinstance(self.penalties.scale_free, bool):
            raise UserError(
                f"penalties.scale_free must be true or false, got {self.penalties.scale_free!r}. Write one of these."
            )
        weights: dict[str, Any] = {name: float(getattr(self.penalties, name)) for name in ("alpha", "beta", "gamma")}
        object.__setattr__(self, "penalties", replace(self.penalties, **weights))
        if self.memory != "auto":
            object.__setattr__(self, "memory", integer("memory", self.memory, 1, "'auto' or a number of bytes"))
        if not isinstance(self.alternation_blocks, str):
            try:
                given = list(self.alternation_blocks)
            except TypeError:
                one_of("alternation_blocks", self.alternation_blocks, BLOCK_CHOICES, " or a list of block indices")
                raise
            object.__setattr__(self, "alternation_blocks", [integer("alternation_blocks", index) for index in given])

    @property
    def fits_target(self) -> bool:
        """Whether any part of the method fits ``target``: the alternation or reconstruction."""
        return self.alternates or bool(self.reconstruction_steps)

    @property
    def tunes(self) -> bool:
        """Whether any weights are tuned by gradient."""
        return self.reconstruction_steps + self.distillation_steps > 0

    @property
    def alternates(self) -> bool:
        """Whether any block is solved by the alternation, beyond its first iteration, which is the local solver."""
        some = self._can_alternate and self.alternation_blocks not in ("none", [])
        return some and self.num_iterations > 1

    @property
    def _can_alternate(self) -> bool:
        """Whether the alternation has anything to solve: heads and blocks are removed without it."""
        return self.method == "sparsellm" and (not self.removes or "neurons" in self.removes)

    @property
    def requested_sparsity(self) -> float:
        """Fraction of zeros asked for: of several shares the largest (a number of blocks is 1), of a budget 1 − share."""
        nofm = parse_nofm(self.pattern)
        if nofm:
            return 1 - nofm[0] / nofm[1]
        if self.budget is not None:
            return 1 - self.budget[1]
        if not isinstance(self.pattern, str):
            return float(max(min(share, 1) for share in self.pattern.values()))
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def pattern_name(self) -> str:
        """The pattern as text."""
        if isinstance(self.pattern, str):
            return self.pattern
        return ", ".join(f"{name} {share:g}" for name, share in self.pattern.items())

    @property
    def budget(self) -> tuple[str, float] | None:
        """``parameters`` or ``latency``, and the share that is kept. None if the pattern is no budget."""
        if isinstance(self.pattern, str):
            return None
        return next(((name, share) for name, share in self.pattern.items() if name in BUDGETS), None)

    @property
    def removed_shares(self) -> dict[str, float]:
        """The shares of ``neurons``, ``heads`` and ``blocks`` to remove. Empty if the pattern is a budget, or of zeros."""
        if self.budget is not None:
            return {}
        given = {self.pattern: self.requested_sparsity} if isinstance(self.pattern, str) else self.pattern
        return {name: share for name, share in given.items() if name in STRUCTURES and share > 0}

    @property
    def removes(self) -> frozenset[str]:
        """Which of ``neurons``, ``heads`` and ``blocks`` are removed. A budget may remove any of them."""
        return frozenset(STRUCTURES if self.budget is not None else self.removed_shares)

    def kept(self, structure: str, number: int) -> int:
        """How many are kept: of hidden units the nearest multiple of ``round_to``. All, if the pattern does not remove them.

        Args:
            structure: ``neurons``, ``heads`` or ``blocks``.
            number: of those that there are.

        Raises:
            UserError: the pattern would keep none, or all.
        """
        share = self.removed_shares.get(structure, 0.0)
        setting = "sparsity" if isinstance(self.pattern, str) else "share"
        step = self.round_to if structure == "neurons" else 1
        kept = number - round(share) if share >= 1 else round((1 - share) * number / step) * step
        if share and not 0 < kept < number:
            noun = {"neurons": "hidden units", "heads": "removable heads"}.get(structure, structure)
            given = f"{share:g} blocks" if share >= 1 else f"{setting} {share:g}"
            given, hint = (
                (f"{given} and round_to {step}", "Lower round_to, or choose") if step > 1 else (given, "Choose")
            )
            raise UserError(
                f"Pattern {structure} must keep some of {number} {noun} and remove some, but {given} keep{'s' * (step == 1)} "
                f"{kept}. {hint} another {setting}."
            )
        return kept if share else number

    @property
    def group(self) -> int:
        """Number of consecutive weights that the pattern decides together: the M of N:M, otherwise 1."""
        nofm = parse_nofm(self.pattern)
        return nofm[1] if nofm else 1

    @property
    def held_out_fraction(self) -> float:
        """``calibration_val_fraction``, or 0 if the method chooses nothing on held-out windows."""
        return self.calibration_val_fraction if self.alternates or self.tunes else 0.0

    def build_pattern(
        self,
        rows: int | None = None,
        ranks: Ranks = SINGLE,
        sparsity: float | None = None,
        first_row: int | None = None,
    ) -> Pattern:
        """The pattern of a matrix.

        Args:
            rows: of the matrix, over all ranks. None: the ranks count them.
            ranks: over which the rows are spread.
            sparsity: replaces the setting's. Ignored by N:M patterns.
            first_row: position of this rank's first row, if rows are not spread evenly over the ranks.
        """
        nofm = parse_nofm(self.pattern)
        if nofm:
            return NofM(*nofm, ranks)
        return Unstructured(self.requested_sparsity if sparsity is None else sparsity, ranks, rows, first_row)

    def alternates_in(self, num_blocks: int) -> set[int]:
        """Indices of the blocks whose feed-forward network the alternation solves.

        Args:
            num_blocks: of the model.

        Raises:
            UserError: an index outside the model.
        """
        if not self._can_alternate or self.alternation_blocks == "none":
            return set()
        if self.alternation_blocks == "all":
            return set(range(num_blocks))
        if self.alternation_blocks == "first_half":
            return set(range(num_blocks // 2))
        outside = [index for index in self.alternation_blocks if not -num_blocks <= int(index) < num_blocks]
        if outside:
            raise UserError(
                f"alternation_blocks must name blocks of the model, which has {num_blocks} (0 to {num_blocks - 1}), got "
                f"{outside}. Correct the indices."
            )
        return {int(index) % num_blocks for index in self.alternation_blocks}
