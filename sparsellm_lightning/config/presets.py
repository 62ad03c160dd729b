"""What can be chosen by name, and what each preset decides."""

from __future__ import annotations

from typing import Any, Literal

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
        "reconstruction_steps": 128,
        "continuations": 2,
        "distillation_steps": 128,
        "damping": 0.3,
    },
}
"""The settings that each preset decides, for up to 32 calibration windows. All presets decide the same ones."""


def preset_settings(preset: Preset, windows: int) -> dict[str, Any]:
    """The settings that a preset decides for a number of calibration windows. More text is tuned on in more steps."""
    settings = PRESETS[preset]
    steps = ("reconstruction_steps", "distillation_steps")
    return settings | {name: settings[name] * max(windows, 32) // 32 for name in steps}
