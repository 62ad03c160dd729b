"""From activations to statistics to weights: the cache of activations, block forwards, and the solve of one input's layers."""

from sparsellm_lightning.calibration.activations import ActivationCache
from sparsellm_lightning.calibration.checks import check_finite_activations, check_finite_weights
from sparsellm_lightning.calibration.context import Context, works_under_autocast
from sparsellm_lightning.calibration.forward import (
    Observer,
    block_output,
    capture,
    observe_input,
    observe_routing,
    run_block,
    tail_logits,
)
from sparsellm_lightning.calibration.importance import feature_importance
from sparsellm_lightning.calibration.layers import LayerSolver, feed_forward_of
from sparsellm_lightning.calibration.routing import ExpertTokens, RoutedTokens

__all__ = [
    "ActivationCache",
    "Context",
    "ExpertTokens",
    "LayerSolver",
    "Observer",
    "RoutedTokens",
    "block_output",
    "capture",
    "check_finite_activations",
    "check_finite_weights",
    "feature_importance",
    "feed_forward_of",
    "observe_input",
    "observe_routing",
    "run_block",
    "tail_logits",
    "works_under_autocast",
]
