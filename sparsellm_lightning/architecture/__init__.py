"""What a model's decoder blocks and their projections are: found by looking, with a table of exceptions."""

from sparsellm_lightning.architecture.blocks import (
    context_of,
    decoder_blocks,
    device_of,
    evaluating,
    find_model,
    hidden_states,
    patched,
    patched_forward,
    token_input,
    unwrapped,
    unwrapped_names,
    vocabulary_of,
    without_cache,
)
from sparsellm_lightning.architecture.discovery import describe
from sparsellm_lightning.architecture.examination import ROUTES
from sparsellm_lightning.architecture.experts import Routing
from sparsellm_lightning.architecture.layout import (
    Attention,
    Block,
    DecoderLayout,
    Experts,
    Linears,
    Network,
    Projection,
    Unit,
    linear_projection,
)
from sparsellm_lightning.architecture.listed import routing_in
from sparsellm_lightning.architecture.probe import run_base
from sparsellm_lightning.architecture.table import ARCHITECTURES, Architecture, register_architecture

__all__ = [
    "ARCHITECTURES",
    "ROUTES",
    "Architecture",
    "Attention",
    "Block",
    "DecoderLayout",
    "Experts",
    "Linears",
    "Network",
    "Projection",
    "Routing",
    "Unit",
    "context_of",
    "decoder_blocks",
    "describe",
    "device_of",
    "evaluating",
    "find_model",
    "hidden_states",
    "linear_projection",
    "patched",
    "patched_forward",
    "register_architecture",
    "routing_in",
    "run_base",
    "token_input",
    "unwrapped",
    "unwrapped_names",
    "vocabulary_of",
    "without_cache",
]
