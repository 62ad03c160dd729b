"""Pruning solvers: pure tensor functions, usable without a model or a Trainer."""

from sparsellm_lightning.solvers.activations import Activation, find_activation, solve_preactivation
from sparsellm_lightning.solvers.admm import admm
from sparsellm_lightning.solvers.auxiliaries import Penalties
from sparsellm_lightning.solvers.feed_forward import FeedForward
from sparsellm_lightning.solvers.local import LOCAL_SOLVERS, InputStatistics
from sparsellm_lightning.solvers.magnitude import magnitude
from sparsellm_lightning.solvers.sparsegpt import sparsegpt
from sparsellm_lightning.solvers.sparsellm import solve_feed_forward
from sparsellm_lightning.solvers.swaps import swap_refine
from sparsellm_lightning.solvers.wanda import wanda

__all__ = [
    "LOCAL_SOLVERS",
    "Activation",
    "FeedForward",
    "InputStatistics",
    "Penalties",
    "admm",
    "find_activation",
    "magnitude",
    "solve_feed_forward",
    "solve_preactivation",
    "sparsegpt",
    "swap_refine",
    "wanda",
]
