"""Pruning solvers: pure tensor functions, usable without a model or a Trainer. They import no other room."""

from sparsellm_lightning.solvers.activations import (
    Activation,
    Entrywise,
    Fused,
    find_activation,
    preactivation_step,
    solve_preactivation,
)
from sparsellm_lightning.solvers.admm import admm
from sparsellm_lightning.solvers.auxiliaries import Penalties
from sparsellm_lightning.solvers.columns import choose_columns, refit_columns, refits, surgeon
from sparsellm_lightning.solvers.divergence import IGNORED, cross_entropy, kl_divergence
from sparsellm_lightning.solvers.errors import NumericalError
from sparsellm_lightning.solvers.factorization import Factor, factorize, spd_inverse
from sparsellm_lightning.solvers.feed_forward import CHUNK, FeedForward
from sparsellm_lightning.solvers.flops import count, counted_by
from sparsellm_lightning.solvers.local import LOCAL_SOLVERS, LocalSolver, solve_stacked
from sparsellm_lightning.solvers.magnitude import magnitude
from sparsellm_lightning.solvers.neurons import Removal, remove_units, with_zeros, without_units
from sparsellm_lightning.solvers.patterns import Containing, NofM, Pattern, Stacked, Unstructured
from sparsellm_lightning.solvers.ranks import SINGLE, Ranks
from sparsellm_lightning.solvers.sparsegpt import sparsegpt
from sparsellm_lightning.solvers.sparsellm import Prune, Solution, solve_feed_forward, solve_locally
from sparsellm_lightning.solvers.statistics import (
    Cross,
    Gram,
    InputStatistics,
    all_finite,
    check_finite,
    relative_error,
)
from sparsellm_lightning.solvers.storage import TokenBuffer, empty, moved
from sparsellm_lightning.solvers.wanda import wanda

__all__ = [
    "CHUNK",
    "IGNORED",
    "LOCAL_SOLVERS",
    "SINGLE",
    "Activation",
    "Containing",
    "Cross",
    "Entrywise",
    "Factor",
    "FeedForward",
    "Fused",
    "Gram",
    "InputStatistics",
    "LocalSolver",
    "NofM",
    "NumericalError",
    "Pattern",
    "Penalties",
    "Prune",
    "Ranks",
    "Removal",
    "Solution",
    "Stacked",
    "TokenBuffer",
    "Unstructured",
    "admm",
    "all_finite",
    "check_finite",
    "choose_columns",
    "count",
    "counted_by",
    "cross_entropy",
    "empty",
    "factorize",
    "find_activation",
    "kl_divergence",
    "magnitude",
    "moved",
    "preactivation_step",
    "refit_columns",
    "refits",
    "relative_error",
    "remove_units",
    "solve_feed_forward",
    "solve_locally",
    "solve_preactivation",
    "solve_stacked",
    "sparsegpt",
    "spd_inverse",
    "surgeon",
    "wanda",
    "with_zeros",
    "without_units",
]
