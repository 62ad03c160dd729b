"""Checks of the settings, before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, get_args

from sparsellm_lightning.config.presets import (
    BUDGETS,
    STRUCTURES,
    Allocation,
    LocalSolverName,
    Method,
    Precision,
    Target,
)
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.solvers import Penalties

if TYPE_CHECKING:
    from sparsellm_lightning.config.settings import PruningConfig


BLOCK_CHOICES = ("all", "none", "first_half")
# The smallest value of the settings that are integers.
LEAST = {"num_iterations": 1, "num_calibration_samples": 1, "round_to": 1} | dict.fromkeys(
    ("reconstruction_steps", "distillation_steps", "continuations"), 0
)


def check_settings(config: PruningConfig) -> None:
    """Refuse values out of their range, and settings that contradict each other.

    Raises:
        UserError: such a value or such settings. The message says what to write instead.
    """
    _check_sparsity(config)
    _check_choices(config)
    _check_numbers(config)


def check_pattern(config: PruningConfig) -> None:
    """Refuse a pattern that is none, before the settings that depend on it are filled in.

    Raises:
        UserError: such a pattern, or a sparsity beside the shares of a pattern.
    """
    parse_nofm(config.pattern)
    if isinstance(config.pattern, str):
        return
    named = "neurons, heads and blocks with the shares to remove, or parameters or latency with the share that is kept"
    if not config.pattern or ({*config.pattern} - {*STRUCTURES} and len(config.pattern) > 1):
        raise UserError(f"pattern must give {named}, got {config.pattern}. Write {{neurons: 0.25, blocks: 3}}.")
    if config.sparsity is not None:
        raise UserError(
            f"pattern {config.pattern} gives the shares, got sparsity {config.sparsity} too. Leave it out, or set it to null."
        )
    for name, share in config.pattern.items():
        one_of("pattern's names", name, (*STRUCTURES, *BUDGETS))
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        count = number and name == "blocks" and share >= 1 and float(share).is_integer()
        low = 0 if name in STRUCTURES else 1e-9
        if not count and not (number and low <= share < 1):
            whole = " or a number of blocks" if name == "blocks" else ""
            raise UserError(f"pattern's {name} must be a share below 1{whole}, got {share!r}. Write 0.25 for 25 %.")


def _check_sparsity(config: PruningConfig) -> None:
    if config.sparsity is None:
        return
    if not 0 <= config.sparsity < 1:
        raise UserError(f"sparsity must be in [0, 1), got {config.sparsity}. Write 0.7 for 70 %.")
    nofm = parse_nofm(config.pattern)
    if nofm and abs(config.sparsity - (1 - nofm[0] / nofm[1])) > 1e-6:
        raise UserError(
            f"pattern {config.pattern} fixes the sparsity at {1 - nofm[0] / nofm[1]:g}, got sparsity "
            f"{config.sparsity:g}. Leave sparsity out (null), or choose another pattern."
        )


def _check_choices(config: PruningConfig) -> None:
    one_of("method", config.method, get_args(Method))
    one_of("local_solver", config.local_solver, get_args(LocalSolverName))
    one_of("target", config.target, get_args(Target))
    one_of("allocation", config.allocation, get_args(Allocation))
    one_of("solver_precision", config.solver_precision, get_args(Precision))
    if isinstance(config.alternation_blocks, str):
        one_of("alternation_blocks", config.alternation_blocks, BLOCK_CHOICES, " or a list of block indices")
    if config.allocation != "uniform" and config.pattern != "unstructured":
        raise UserError(
            f"allocation {config.allocation} needs pattern unstructured, because pattern {config.pattern_name} fixes every "
            "sparsity. Use allocation uniform, or pattern unstructured."
        )
    if "blocks" in config.removes and config.ignore:
        raise UserError(
            f"pattern {config.pattern_name} may remove whole blocks, but ignore keeps {', '.join(config.ignore)} in them. "
            "Leave ignore out, or remove neurons or heads instead."
        )
    if config.target == "model" and not config.fits_target:
        raise UserError(
            f"target model needs a method that fits it, but method is {config.method} without reconstruction"
            f"{' and without an alternation' * (config.method == 'sparsellm')}. Set reconstruction_steps, use method sparsellm "
            "with several num_iterations, or leave target out."
        )


def _check_numbers(config: PruningConfig) -> None:
    for name, low, high in (
        ("allocation_spread", 0.0, 1.0),
        ("calibration_val_fraction", 0.0, 0.5),
        ("damping", 0.0, float("inf")),
    ):
        value = getattr(config, name)
        if not low <= value <= high or value == float("inf"):
            limits = f"between {low:g} and {high:g}" if high < float("inf") else "non-negative and finite"
            raise UserError(f"{name} must be {limits}, got {value}. Leave it out for the default.")
    for name in ("alpha", "beta", "gamma"):
        value = getattr(config.penalties, name)
        if not 0 < value < float("inf"):
            raise UserError(
                f"penalties.{name} must be positive and finite, got {value}. The default is {getattr(Penalties(), name):g}."
            )


def parse_nofm(pattern: dict[str, float] | str) -> tuple[int, int] | None:
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


def integer(name: str, value: object, least: int | None = None, kind: str = "an integer") -> int:
    """An integer of any type as Python's.

    Raises:
        UserError: something else, or less than ``least``.
    """
    try:
        number = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise UserError(
            f"{name} must be {kind}{bound}, got {value!r}. Write {'an integer' if least is None else least}."
        )
    return number


def one_of(name: str, value: object, allowed: Sequence[str], more: str = "") -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        UserError: ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}{more}, got {value!r}. Choose one of these.")
