"""Models: loading, training and evaluating them, and writing them as Hugging Face folders."""

from sparsellm_lightning.models.attributes import is_sparse_already, pretrained_of, tokenizer_of, weights_of
from sparsellm_lightning.models.buffers import keep_in_conversions, kept_in_float32, stop_keeping
from sparsellm_lightning.models.causal_lm import CausalLM
from sparsellm_lightning.models.checkpoint import check_checkpoint
from sparsellm_lightning.models.evaluation import (
    check_inputs,
    labels_in,
    model_inputs,
    perplexity,
    positions_together,
)
from sparsellm_lightning.models.examples import continued, first_prompts
from sparsellm_lightning.models.export import (
    REPORT_NAME,
    add_to_report,
    check_companions,
    check_export_dir,
    check_rebuildable,
    export_model,
    export_or_rescue,
    recover_export,
    replace_text,
)
from sparsellm_lightning.models.head import Forward, decoder_output, head_in, logits_at
from sparsellm_lightning.models.hub import check_hub, upload
from sparsellm_lightning.models.loading import check_dtype, load_model, load_tokenizer, note_untied
from sparsellm_lightning.models.skeleton import inspect_model
from sparsellm_lightning.models.smaller import (
    Shrinkage,
    Smaller,
    check_shrinkable,
    fixed_shrinkage,
    plain_class,
    shrink,
)
from sparsellm_lightning.models.speed import Speed, measure_speed
from sparsellm_lightning.models.verify import read_report, verify_export
from sparsellm_lightning.models.vocabulary import VocabularySample, can_sample, likely_tokens, size_of_sample

__all__ = [
    "REPORT_NAME",
    "CausalLM",
    "Forward",
    "Shrinkage",
    "Smaller",
    "Speed",
    "VocabularySample",
    "add_to_report",
    "can_sample",
    "check_checkpoint",
    "check_companions",
    "check_dtype",
    "check_export_dir",
    "check_hub",
    "check_inputs",
    "check_rebuildable",
    "check_shrinkable",
    "continued",
    "decoder_output",
    "export_model",
    "export_or_rescue",
    "first_prompts",
    "fixed_shrinkage",
    "head_in",
    "inspect_model",
    "is_sparse_already",
    "keep_in_conversions",
    "kept_in_float32",
    "labels_in",
    "likely_tokens",
    "load_model",
    "load_tokenizer",
    "logits_at",
    "measure_speed",
    "model_inputs",
    "note_untied",
    "perplexity",
    "plain_class",
    "positions_together",
    "pretrained_of",
    "read_report",
    "recover_export",
    "replace_text",
    "shrink",
    "size_of_sample",
    "stop_keeping",
    "tokenizer_of",
    "upload",
    "verify_export",
    "weights_of",
]
