"""What to prune and how: the only list of settings, validated before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsFloat, get_args

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import SINGLE, NofM, Pattern, Penalties, Ranks, Unstructured

Preset = Literal["paper", "fast", "balanced", "best"]
Method = Literal["sparsellm", "admm", "sparsegpt", "wanda", "magnitude"]
LocalSolverName = Literal["admm", "sparsegpt", "wanda", "magnitude"]
Target = Literal["block", "model"]
Allocation = Literal["uniform", "owl", "atp", "kl", "kl_blocks"]
Precision = Literal["auto", "float32"]

STRUCTURES = ("neurons", "heads", "blocks")
BUDGETS = ("parameters", "latency")

_PAPER: dict[str, Any] = {
    "method": "sparsellm",
    "local_solver": "sparsegpt",
    "num_iterations": 4,
    "target": "block",
    "allocation": "uniform",
    "reconstruction_steps": 0,
    "continuations": 0,
    "distillation_steps": 0,
    "damping": 0.01,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "fast": _PAPER | {"method": "sparsegpt", "reconstruction_steps": 6, "damping": 0.1},
    "balanced": _PAPER
    | {
        "method": "admm",
        "target": "model",
        "allocation": "kl_blocks",
        "reconstruction_steps": 24,
        "distillation_steps": 40,
        "damping": 0.3,
    },
    "best": _PAPER
    | {
        "method": "admm",
        "target": "model",
        "allocation": "kl",
        "reconstruction_steps": 24,
        "continuations": 2,
        "distillation_steps": 128,
        "damping": 0.3,
    },
}
"""The settings that each preset decides. All presets decide the same ones."""


@dataclass(frozen=True)
class PruningConfig:
    """Settings of the pruner. Settings that a preset decides are None until construction replaces None by the preset's value.

    Args:
        sparsity: fraction of zeros in every pruned matrix (with ``allocation``: over all of them), in [0, 1); of pattern
            ``neurons``, ``heads`` or ``blocks`` the fraction of units, heads or blocks. None: 0.5, or the sparsity of an N:M
            pattern.
        pattern: ``unstructured``; N:M written kept:group, such as ``2:4``, ``4:8``, ``1:4``. Or what leaves as a whole, so
            that a smaller dense model is exported: ``neurons``: hidden units of the feed-forward networks, equally many in
            every block; ``heads``: key-value heads with the query heads that use them, likewise (query heads, if all share one
            key-value head); ``blocks``: decoder blocks, those that the model's output can best do without. Or several of these
            with their shares, such as ``{neurons: 0.25, heads: 0, blocks: 3}`` (blocks as a share or a number), or the share of
            the decoder blocks that is kept, ``{parameters: 0.7}`` or ``{latency: 0.7}`` (of a forward over one window), which
            is divided over units, heads and blocks by the divergence of the model's output.
        round_to: number by which the hidden units that are kept are divisible.
        preset: values for the settings from ``method`` to ``damping``. ``paper``: SparseLLM as published, in this
            implementation. ``fast``: hardly slower than one-shot pruning. ``balanced``. ``best``: most accurate. A setting that
            is given wins over the preset.
        method: ``sparsellm`` (feed-forward blocks by the alternation, other projections by ``local_solver``), or one local
            solver for all projections: ``admm``, ``sparsegpt``, ``wanda``, ``magnitude``.
        local_solver: solver inside ``sparsellm``: of the attention projections, and of the alternation's weight steps.
        num_iterations: iterations of the alternation. The first is the local solver.
        target: output that alternation and reconstruction fit. ``block``: the dense block's output on the pruned model's
            activations. ``model``: the dense model's output at this block, so that each block also corrects the error of the
            blocks before it.
        allocation: how the sparsity is divided, its mean being kept. ``uniform``: equal everywhere. ``owl``, ``atp``: published
            rules by block (arXiv 2310.05175, 2502.14770). ``kl``: by projection, from the measured KL divergence of the model's
            output when that projection alone is pruned. ``kl_blocks``: by block, likewise, in a fraction of the time.
            Unstructured patterns only.
        reconstruction_steps: Adam steps that tune each block's kept weights, norms and biases after its solve, with the mask
            fixed. Features of the block's output count by the gradient of the model's output. 0: none.
        distillation_steps: Adam steps of 512 tokens that tune all kept weights together at the end, on the dense model's
            next-token distributions over the fitted windows. They need the memory of the gradients and Adam's moments of all
            kept weights, and where weights are sharded of all gradients. A preset that asks for them goes without, with a
            warning, where the model has no language-model head or the memory does not suffice. 0: none.
        continuations: windows that the dense model writes for each fitted calibration window, and that are fitted too: one that
            continues each 32 tokens of it, and others that continue random tokens of the vocabulary, for text of other kinds.
        damping: added to the diagonal of each Gram matrix, as a fraction of its mean.
        alternation_blocks: blocks whose feed-forward network ``sparsellm`` solves by the alternation (the paper's Ω): ``all``,
            ``none``, ``first_half``, or block indices (negative ones count from the end). ``local_solver`` solves the others.
        penalties: weights α, β, γ of the alternation's objective, and whether they are scale-free.
        allocation_spread: largest distance of one block's (``kl``: one projection's) sparsity from the mean. ``owl``: half the
            width of the range of sparsities, which is then shifted so that their mean is the one asked for.
        ignore: name patterns of projections that stay dense, shell-style, matched against the whole name or its tail
            (``down_proj``, ``layers.0.*``). Not with patterns that may remove blocks.
        num_calibration_samples: calibration windows, over all ranks.
        calibration_val_fraction: fraction of the calibration windows that are held out. No weight is fitted to them; iterates
            and reconstruction steps are chosen on them. Rounded down to whole windows. Methods that choose nothing fit all
            windows.
        seed: of the choice of calibration windows, of continuations and of the order of reconstruction batches.
        solver_precision: ``auto``: bfloat16 products for the alternation's auxiliaries, for reconstruction, and for
            continuations, where the hardware is faster at them and the model is float32. Gram matrices and solvers are always
            float32. ``float32``: no bfloat16.
        memory: bytes that pruning may hold on each rank's device besides the model, or ``auto``: most of what is free. With
            less, activations and Adam's moments are kept in host memory: slower, the same result.

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
        _one_of("preset", self.preset, tuple(PRESETS))
        nofm = _parse_nofm(self.pattern)
        self._check_shares()
        target_given = self.target is not None
        allocation_given = self.allocation is not None
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.pattern != "unstructured" and not allocation_given:  # the pattern fixes every sparsity
            object.__setattr__(self, "allocation", "uniform")
        if not target_given and not self.fits_target:
            object.__setattr__(self, "target", "block")
        if not target_given and "blocks" in self.removes and self.reconstruction_steps:
            object.__setattr__(self, "target", "model")  # only the dense model's output makes up for a block that left
        if isinstance(self.ignore, str):
            raise UserError(
                f"ignore must be a list of patterns, got the string {self.ignore!r}. Write ['{self.ignore}']."
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        for name in ("sparsity", "damping", "allocation_spread", "calibration_val_fraction"):
            value = getattr(self, name)
            if isinstance(value, SupportsFloat):  # NumPy's numbers too, which JSON does not know
                object.__setattr__(self, name, float(value))
        self._check_sparsity(nofm)
        self._check_choices()
        self._check_numbers()

    def _check_shares(self) -> None:
        """Refuse a pattern of several shares that is not one."""
        if isinstance(self.pattern, str):
            return
        named = (
            "neurons, heads and blocks with the shares that leave, or parameters or latency with the share that is kept"
        )
        if not self.pattern or ({*self.pattern} - {*STRUCTURES} and len(self.pattern) > 1):
            raise UserError(f"pattern must give {named}, got {self.pattern}. Write {{neurons: 0.25, blocks: 3}}.")
        if self.sparsity is not None:
            raise UserError(f"pattern {self.pattern} gives the shares, got sparsity {self.sparsity} too. Leave it out.")
        for name, share in self.pattern.items():
            _one_of("pattern's names", name, (*STRUCTURES, *BUDGETS))
            count = name == "blocks" and isinstance(share, (int, float)) and share >= 1 and float(share).is_integer()
            low = 0 if name in STRUCTURES else 1e-9
            if not count and (isinstance(share, bool) or not isinstance(share, (int, float)) or not low <= share < 1):
                whole = " or a number of blocks" if name == "blocks" else ""
                raise UserError(f"pattern's {name} must be a share below 1{whole}, got {share!r}. Write 0.25 for 25 %.")

    def _check_sparsity(self, nofm: tuple[int, int] | None) -> None:
        if self.sparsity is None:
            return
        if not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity must be in [0, 1), got {self.sparsity}. Write 0.7 for 70 %.")
        if nofm and abs(self.sparsity - (1 - nofm[0] / nofm[1])) > 1e-6:
            raise UserError(
                f"pattern {self.pattern} fixes the sparsity at {1 - nofm[0] / nofm[1]:g}, got sparsity "
                f"{self.sparsity:g}. Leave sparsity out (null), or choose another pattern."
            )

    def _check_choices(self) -> None:
        _one_of("method", self.method, get_args(Method))
        _one_of("local_solver", self.local_solver, get_args(LocalSolverName))
        _one_of("target", self.target, get_args(Target))
        _one_of("allocation", self.allocation, get_args(Allocation))
        _one_of("solver_precision", self.solver_precision, get_args(Precision))
        if isinstance(self.alternation_blocks, str):
            choices = ("all", "none", "first_half")
            _one_of("alternation_blocks", self.alternation_blocks, choices, " or a list of block indices")
        if self.allocation != "uniform" and self.pattern != "unstructured":
            raise UserError(
                f"allocation {self.allocation} needs pattern unstructured, because pattern {self.pattern_name} fixes every "
                "sparsity. Use allocation uniform, or pattern unstructured."
            )
        if "blocks" in self.removes and self.ignore:
            raise UserError(
                f"pattern {self.pattern_name} may remove whole blocks, but ignore keeps {', '.join(self.ignore)} in them. "
                "Leave ignore out, or remove neurons or heads instead."
            )
        if self.target == "model" and not self.fits_target:
            raise UserError(
                f"target model needs a method that fits it, but method is {self.method} without reconstruction. Use method "
                "sparsellm, set reconstruction_steps, or leave target out."
            )

    def _check_numbers(self) -> None:
        for name in ("num_iterations", "num_calibration_samples", "round_to"):
            _integer(name, getattr(self, name), 1)
        for name in ("reconstruction_steps", "distillation_steps", "continuations"):
            _integer(name, getattr(self, name), 0)
        if self.memory != "auto":
            _integer("memory", self.memory, 1, "'auto' or a number of bytes")
        for name, low, high in (
            ("allocation_spread", 0.0, 1.0),
            ("calibration_val_fraction", 0.0, 0.5),
            ("damping", 0.0, float("inf")),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value == float("inf"):
                limits = f"between {low:g} and {high:g}" if high < float("inf") else "non-negative and finite"
                raise UserError(f"{name} must be {limits}, got {value}. Leave it out for the default.")
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self.penalties, name)
            if not 0 < value < float("inf"):
                raise UserError(
                    f"penalties.{name} must be positive and finite, got {value}. The default is {getattr(Penalties(), name):g}."
                )

    @property
    def fits_target(self) -> bool:
        """Whether any part of the method fits ``target``: the alternation or reconstruction."""
        return self.method == "sparsellm" or bool(self.reconstruction_steps)

    @property
    def requested_sparsity(self) -> float:
        """The fraction of zeros that ``sparsity`` or ``pattern`` asks for. Of several shares the largest; a number is 1."""
        nofm = _parse_nofm(self.pattern)
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
        """The shares of ``neurons``, ``heads`` and ``blocks`` that leave. Empty if the pattern is a budget, or of zeros."""
        if self.budget is not None:
            return {}
        given = {self.pattern: self.requested_sparsity} if isinstance(self.pattern, str) else self.pattern
        return {name: share for name, share in given.items() if name in STRUCTURES and share > 0}

    @property
    def removes(self) -> frozenset[str]:
        """Which of ``neurons``, ``heads`` and ``blocks`` leave. A budget may remove any of them."""
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
        step = self.round_to if structure == "neurons" else 1
        kept = number - round(share) if share >= 1 else round((1 - share) * number / step) * step
        if share and not 0 < kept < number:
            noun = {"neurons": "hidden units", "heads": "heads that can leave alone"}.get(structure, structure)
            given = f"{share:g} blocks" if share >= 1 else f"sparsity {share:g}"
            given, hint = (
                (f"{given} and round_to {step}", "Lower round_to, or choose") if step > 1 else (given, "Choose")
            )
            raise UserError(
                f"Pattern {structure} must keep some of {number} {noun}, but {given} keep{'s' * (step == 1)} {kept}. "
                f"{hint} another sparsity."
            )
        return kept if share else number

    @property
    def group(self) -> int:
        """Number of consecutive weights that the pattern decides together: the M of N:M, otherwise 1."""
        nofm = _parse_nofm(self.pattern)
        return nofm[1] if nofm else 1

    @property
    def held_out_fraction(self) -> float:
        """``calibration_val_fraction``, or 0 if the method chooses nothing on held-out windows."""
        alternates = (
            self.method == "sparsellm" and self.num_iterations > 1 and self.alternation_blocks not in ("none", [])
        )
        tunes = self.reconstruction_steps or self.distillation_steps
        return self.calibration_val_fraction if alternates or tunes else 0.0

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
        nofm = _parse_nofm(self.pattern)
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
        if self.method != "sparsellm" or self.alternation_blocks == "none":
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


def _parse_nofm(pattern: dict[str, float] | str) -> tuple[int, int] | None:
    """``(kept, group)`` of an N:M pattern such as ``"2:4"``. None for patterns without groups.

    Raises:
        UserError: neither of these, nor kept:group with 0 < kept < group.
    """
    if isinstance(pattern, dict) or pattern in ("unstructured", *STRUCTURES):
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < group:
        raise UserError(
            "pattern must be 'unstructured', 'neurons', 'heads', 'blocks', kept:group with 0 < kept < group, or shares by "
            f"name, got {pattern!r}. Write '2:4' to keep 2 of every 4 weights."
        )
    return kept, group


def _integer(name: str, value: object, low: int, kind: str = "an integer") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{name} must be {kind} of at least {low}, got {value!r}. Correct it.")


def _one_of(name: str, value: object, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}{more}, got {value!r}. Choose one of these.")
