"""What to prune and how: one validated dataclass, refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparsellm_lightning.errors import UserError
from sparsellm_lightning.patterns import NofM, Pattern, Unstructured, parse_nofm
from sparsellm_lightning.ranks import SINGLE, Ranks

Quality = Literal["fast", "balanced", "best"]
Method = Literal["sparsellm", "admm", "sparsegpt", "wanda", "magnitude"]
LocalSolver = Literal["admm", "sparsegpt", "wanda", "magnitude"]
Allocation = Literal["uniform", "owl", "atp", "error"]
Refine = Literal["none", "weights", "mask"]
Target = Literal["block", "model"]
Precision = Literal["auto", "float32"]
AutoOrNumber = Literal["auto"] | int


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{name} must be an integer of at least {low}, got {value!r}.")


@dataclass(frozen=True)
class Reconstruction:
    """How the kept weights of a solved block are tuned by gradient on the block's output, the mask being fixed.

    Args:
        steps: of Adam.
        learning_rate: its largest one, after a tenth of the steps; then it falls to zero along a half cosine. In units of each
            parameter's own size: the root mean square of its kept entries, divided by the share that is kept.
        batch_tokens: tokens a step, over all ranks, in whole windows and at least one on each rank. Many small steps fit better
            than few large ones.
        others: tune the block's norms and biases too.
    """

    steps: int = 128
    learning_rate: float = 4e-3
    batch_tokens: int = 512
    others: bool = True

    def check(self) -> None:
        """Refuse values out of their range.

        Raises:
            UserError: says what to write instead.
        """
        # Not at construction: jsonargparse would wrap the message in those of the other types that the setting may have.
        for name in ("steps", "batch_tokens"):
            _integer(f"reconstruct.{name}", getattr(self, name), 1)
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(
                f"reconstruct.learning_rate must be positive and finite, got {self.learning_rate}. The default is 0.004."
            )


DEFAULTS: dict[str, Any] = {
    "method": "sparsellm",
    "local_solver": "sparsegpt",
    "num_iterations": 4,
    "target": "block",
    "allocation": "uniform",
    "refine": "none",
    "reconstruct": False,
    "continuations": 0,
    "damping": 0.01,
}
# What each quality changes of them.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "sparsegpt", "reconstruct": Reconstruction(steps=6), "damping": 0.1},
    "balanced": {"method": "sparsegpt", "target": "model", "reconstruct": Reconstruction(steps=96), "damping": 0.1},
    "best": {
        "method": "admm",
        "target": "model",
        "allocation": "error",
        "reconstruct": Reconstruction(steps=256),
        "continuations": 2,
        "damping": 0.1,
    },
}


@dataclass(frozen=True)
class PruningConfig:
    """Settings of the pruner.

    Args:
        sparsity: fraction of zeros in every pruned matrix, in [0, 1). ``None`` is 0.5, or what an N:M pattern implies.
        pattern: ``unstructured``, or N:M written kept:group: ``2:4``, ``4:8``, ``1:4``, ...
        quality: a set of the settings from ``method`` to ``damping``, each of which can be given all the same: see
            ``PRESETS``. ``fast``: little more than one-shot pruning; ``balanced``; ``best``. None is the paper's method.
        method: ``sparsellm`` (feed-forward blocks by the alternation, the rest by ``local_solver``), or one local solver
            for everything: ``admm``, ``sparsegpt``, ``wanda``, ``magnitude``.
        local_solver: what ``sparsellm`` uses for attention and inside the alternation.
        num_iterations: iterations of the alternation; the first is the local solver.
        target: what alternation and reconstruction fit. ``block``: the dense block's output on the pruned model's input.
            ``model``: the output the dense model had at this point, so that each block also corrects the error before it.
        allocation: how the sparsity, whose mean over all pruned weights is kept, is spread over the model. ``uniform``: every
            projection has it; ``owl`` and ``atp``: published rules by block (arXiv 2310.05175, 2502.14770); ``error``: by what
            pruning each projection was measured to do to the model's output on calibration text, less in early blocks where
            ``reconstruct`` has ``target`` ``model``, as later ones undo some. Unstructured patterns only.
        refine: what follows a local solver: ``none``; ``weights``: the kept weights are solved for again, on the mask it found;
            ``mask``: kept and pruned weights of a row are exchanged too, where that lowers the error.
        reconstruct: tune the kept weights of every block by gradient once it is solved, towards ``target``; ``False`` does not.
        continuations: windows that the model, before it is pruned, writes itself for each fitted calibration window, and
            that are fitted too: what would come next after each part of the window
            (:func:`~sparsellm_lightning.generation.rewrite_windows`).
        damping: added to the diagonal of each Gram matrix, as a fraction of its mean.
        global_blocks: which blocks' feed-forward networks the alternation solves (the paper's Ω): ``all``, ``none``,
            ``first_half``, or block indices (negative ones count from the end). The other blocks use ``local_solver``.
        alpha: weight of the pre-activation terms ``|z - W_u x|² + |s - W_g x|²``.
        beta: weight of the output term ``|y - W_d p|²``.
        gamma: weight of the activation term ``|p - φ(s) z|²``.
        scale_free: divide every term by the mean square of its target, so that α, β and γ mean the same in every block.
            ``False`` is the paper's raw objective, for reproduction.
        block_size: columns per step of the SparseGPT sweep; the unstructured mask is chosen per step.
        skip: name patterns of projections left dense, shell-style, matched against the whole name or its tail
            (``down_proj``, ``layers.0.*``).
        solver_precision: ``auto``: the alternation moves its auxiliaries with bfloat16 products where the hardware is fast at
            them (Gram and cross matrices, and all that decides a weight, stay float32); ``float32``: it never does.
            Likewise the steps of reconstruction, and ``continuations``, of models in float32.
        alternation_tokens: calibration tokens, over all ranks, that carry the alternation's auxiliaries, in whole windows; the
            first and last iteration, which decide the result, see all. ``auto`` is 5 per hidden feature; more than there are is
            all.
        memory: bytes that pruning may hold on each rank's device besides the model; ``auto`` is most of what is free. With
            less, activations are computed again instead of kept, then kept in pinned host memory: slower, the same result.
        allocation_spread: by how much a block's sparsity, with ``error`` a projection's, may differ from the mean.
        held_out: share of the calibration windows that no weight is fitted to: what pruning chooses between (iterates of the
            alternation, steps of the reconstruction), it chooses on them. Rounded down to whole windows; methods that choose
            nothing fit all windows.
        keep_zeros: weights that are zero already are pruned first, whatever they would be worth: the new mask contains the old
            one (gradual pruning).
        num_calibration_samples: calibration windows, over all ranks.
        seed: seeds the choice of calibration windows.

    Raises:
        UserError: a value out of its range; the message says what to write instead.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    quality: Quality | None = None
    # None, until construction puts the preset's or the default in its place.
    method: Method = None  # type: ignore[assignment]
    local_solver: LocalSolver = None  # type: ignore[assignment]
    num_iterations: int = None  # type: ignore[assignment]
    target: Target = None  # type: ignore[assignment]
    allocation: Allocation = None  # type: ignore[assignment]
    refine: Refine = None  # type: ignore[assignment]
    reconstruct: Reconstruction | Literal[False] = None  # type: ignore[assignment]
    continuations: int = None  # type: ignore[assignment]
    damping: float = None  # type: ignore[assignment]
    global_blocks: str | list[int] = "all"
    alpha: float = 1.0
    beta: float = 10.0
    gamma: float = 1.0
    scale_free: bool = True
    block_size: int = 128
    skip: Sequence[str] = ()
    solver_precision: Precision = "auto"
    alternation_tokens: AutoOrNumber = "auto"
    memory: AutoOrNumber = "auto"
    allocation_spread: float = 0.15
    held_out: float = 1 / 8
    keep_zeros: bool = False
    num_calibration_samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        nofm = parse_nofm(self.pattern)
        if self.quality is not None:
            _one_of("quality", self.quality, tuple(PRESETS))
        preset = PRESETS.get(self.quality or "", {})
        if nofm:  # fixes every block's sparsity
            preset = {name: value for name, value in preset.items() if name != "allocation"}
        target_given = self.target is not None
        for name, value in {**DEFAULTS, **preset}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not target_given and self.method != "sparsellm" and not self.reconstruct:
            object.__setattr__(self, "target", "block")  # nothing fits the preset's one
        if self.sparsity is not None:
            if not 0 <= self.sparsity < 1:
                raise UserError(f"sparsity must be in [0, 1), got {self.sparsity}. Write 0.7 for 70 %.")
            if nofm and abs(self.sparsity - (1 - nofm[0] / nofm[1])) > 1e-6:
                raise UserError(
                    f"pattern {self.pattern} fixes the sparsity at {1 - nofm[0] / nofm[1]:g}, got sparsity "
                    f"{self.sparsity:g}. Leave sparsity out (null) or choose another pattern."
                )
        _one_of("method", self.method, get_args(Method))
        _one_of("local_solver", self.local_solver, get_args(LocalSolver))
        _one_of("target", self.target, get_args(Target))
        _one_of("solver_precision", self.solver_precision, get_args(Precision))
        if isinstance(self.reconstruct, Reconstruction):
            self.reconstruct.check()
        elif self.reconstruct is not False:
            raise UserError(
                f"reconstruct must be a Reconstruction or False, got {self.reconstruct!r}. Write Reconstruction(steps=64), or "
                "in YAML 'steps: 64' under reconstruct."
            )
        _one_of("refine", self.refine, get_args(Refine))
        _one_of("allocation", self.allocation, get_args(Allocation))
        if self.allocation != "uniform" and nofm:
            raise UserError(
                f"allocation {self.allocation} gives blocks different sparsities, but pattern {self.pattern} fixes them. "
                "Use allocation uniform, or pattern unstructured."
            )
        if not 0 <= self.allocation_spread < 1:
            raise UserError(f"allocation_spread must be in [0, 1), got {self.allocation_spread}. The default is 0.15.")
        if self.target == "model" and self.method != "sparsellm" and not self.reconstruct:
            raise UserError(
                f"target='model' is fitted by the alternation and by reconstruct, but method is {self.method!r}. "
                "Use method='sparsellm', reconstruct, or target='block'."
            )
        for name, unit, example in [("memory", "bytes", 8_000_000_000), ("alternation_tokens", "tokens", 65_536)]:
            value = getattr(self, name)
            if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(
                    f"{name} must be 'auto' or a positive number of {unit}, got {value!r}. Write {example}."
                )
        if isinstance(self.skip, str):
            raise UserError(f"skip must be a list of patterns, got the string {self.skip!r}. Write ['{self.skip}'].")
        for name in ("num_iterations", "block_size", "num_calibration_samples"):
            _integer(name, getattr(self, name), 1)
        _integer("continuations", self.continuations, 0)
        for name in ("alpha", "beta", "gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(
                    f"{name} must be positive and finite, got {getattr(self, name)}. The default is 1 or 10."
                )
        if not 0 <= self.held_out <= 0.5:
            raise UserError(f"held_out must be a share between 0 and 0.5, got {self.held_out}. The default is 0.125.")
        if not 0 <= self.damping < float("inf"):
            raise UserError(f"damping must be non-negative and finite, got {self.damping}. The default is 0.01.")
        if isinstance(self.global_blocks, str):
            _one_of("global_blocks", self.global_blocks, ("all", "none", "first_half"), " or a list of block indices")

    @property
    def requested_sparsity(self) -> float:
        """The fraction of zeros asked for, whichever of ``sparsity`` and ``pattern`` gave it."""
        nofm = parse_nofm(self.pattern)
        if nofm:
            return 1 - nofm[0] / nofm[1]
        return 0.5 if self.sparsity is None else self.sparsity

    def batch_tokens(self, ranks: int) -> int | None:
        """The most tokens a calibration batch of one of so many ranks may have; None is any number."""
        return self.reconstruct.batch_tokens // ranks if self.reconstruct else None

    @property
    def held_out_share(self) -> float:
        """``held_out``, or 0 where nothing is chosen."""
        alternates = self.method == "sparsellm" and self.num_iterations > 1 and self.global_blocks not in ("none", [])
        return self.held_out if alternates or self.reconstruct else 0.0

    def build_pattern(self, rows: int | None = None, ranks: Ranks = SINGLE, sparsity: float | None = None) -> Pattern:
        """The pattern object for a matrix whose ``rows`` are spread over ``ranks``; ``sparsity`` replaces the settings' one."""
        nofm = parse_nofm(self.pattern)
        if nofm:
            return NofM(*nofm, ranks)
        return Unstructured(self.requested_sparsity if sparsity is None else sparsity, ranks, rows)

    def globally_solved(self, num_blocks: int) -> set[int]:
        """Indices of the blocks whose feed-forward network the alternation solves.

        Raises:
            UserError: an index outside the model.
        """
        if self.method != "sparsellm" or self.global_blocks == "none":
            return set()
        if self.global_blocks == "all":
            return set(range(num_blocks))
        if self.global_blocks == "first_half":
            return set(range(num_blocks // 2))
        outside = [index for index in self.global_blocks if not -num_blocks <= int(index) < num_blocks]
        if outside:
            raise UserError(
                f"global_blocks must name blocks of the model, which has {num_blocks} (0 to {num_blocks - 1}), got {outside}."
            )
        return {int(index) % num_blocks for index in self.global_blocks}


def _one_of(name: str, value: object, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}{more}, got {value!r}.")
