"""What is refused, dropped or warned of before a model is pruned."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsellm_lightning.architecture import ROUTES, DecoderLayout, device_of
from sparsellm_lightning.calibration import Context
from sparsellm_lightning.config import PruningConfig, preset_settings
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.errors import UserError
from sparsellm_lightning.reporting import layer_rows
from sparsellm_lightning.runtime import check_device, dtype_of_products, gemm_peak
from sparsellm_lightning.solvers import Ranks
from sparsellm_lightning.sparsity import MANY_ZEROS, adapter_at_work


def check_place(model: PreTrainedModel) -> None:
    """Refuse what pruning cannot run in.

    Raises:
        UserError: an Apple GPU, several devices, a call inside autocast or inference mode, or parameters made in the latter.
    """
    check_device(device_of(model))
    devices = sorted({str(parameter.device) for parameter in model.parameters() if not parameter.is_meta})
    if len(devices) > 1:
        raise UserError(
            f"Pruning needs a model on one device, or under a strategy that shards it, got {', '.join(devices)}. Load it "
            "without device_map; several GPUs are used by ranks."
        )
    if torch.is_autocast_enabled(device_of(model).type):
        raise UserError(
            "prune_model must not be called inside torch.autocast, which keeps copies of weights from before they are pruned. "
            "Call it outside: a Trainer's precision, or the model's dtype, says how it computes."
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UserError(
            "prune_model needs gradients, which torch.inference_mode never gives. Weights that were loaded inside it never "
            "get any. Load the model and call prune_model outside torch.inference_mode."
        )


def without_predictions(layout: DecoderLayout, config: PruningConfig, adapter: StrategyAdapter) -> PruningConfig:
    """The settings. If the model gives no next-token distributions, drops what only the preset asks for and needs them.

    Warns of the dropped settings.
    """
    if layout.predicts:
        return config
    preset = preset_settings(config.preset, config.num_calibration_samples)
    needed: dict[str, Any] = {"allocation": "uniform", "continuations": 0, "distillation_steps": 0}
    if config.allocation not in ("kl", "kl_blocks"):
        del needed["allocation"]
    dropped = {name: value for name, value in needed.items() if getattr(config, name) == preset[name] != value}
    if dropped:
        why = layout.why_not_predicting
        _warn(
            adapter.ranks,
            f"Preset {config.preset} goes without its {', '.join(dropped)}: {type(layout.model).__name__} {why}.",
        )
    return replace(config, **dropped)


def check_adapters_untrained(context: Context) -> None:
    """Refuse LoRA adapters that have been trained: the solvers see a layer's own weight."""
    name = adapter_at_work(context.layout.model)
    if not context.ranks.all(name is None):
        where = f"that of {name} changes" if name else "one changes"
        raise UserError(
            f"Pruning solves for the layers' own weights, so LoRA adapters must do nothing yet, but {where} its layer's "
            "output. Merge adapters first (peft's merge_and_unload), or train them after pruning."
        )


def warn_of_idle_settings(context: Context) -> None:
    """Name settings that were given and that nothing reads."""
    config = context.config
    default = PruningConfig(preset=config.preset)
    of_alternation = ("local_solver", "num_iterations", "alternation_blocks", "penalties")
    alternation = f"only method sparsellm alternates, and method is {config.method}"
    for names, read, why in (
        (of_alternation, config.method == "sparsellm", alternation),
        (("allocation_spread",), config.allocation != "uniform", "allocation is uniform"),
        (("round_to",), "neurons" in config.removes, f"pattern {config.pattern_name} removes no hidden units"),
    ):
        given = [name for name in names if getattr(config, name) != getattr(default, name)]
        if given and not read:
            _warn(context.ranks, f"Without effect: {', '.join(given)}, because {why}.")


def warn_of_few_tokens(context: Context, windows: int, tokens: int) -> None:
    wanted = context.config.num_calibration_samples
    if windows < wanted:
        _warn(
            context.ranks,
            f"num_calibration_samples is {wanted}, but the dataloader gave {windows} windows in which a token counts. All "
            "of them are used.",
        )
    widest = max((p.shape[1] for p in context.layout.projections() if p.pruned), default=0)
    if tokens < widest:
        _warn(
            context.ranks,
            f"{tokens} calibration tokens are fewer than the {widest} input features of the widest projection: its "
            "statistics are rank-deficient. Use more or longer windows.",
        )


def warn_of_slow_products(context: Context) -> None:
    """Warn of forwards in a dtype in which this CPU multiplies many times slower than in float32, as many do in bfloat16."""
    with context.adapter.forward_context():
        dtype = dtype_of_products(next(context.layout.projections()).parameter)
    if context.device.type != "cpu" or context.ranks.rank > 0 or dtype == torch.float32:
        return
    own, single = (gemm_peak(context.device, kind, seconds=0.02) for kind in (dtype, torch.float32))
    if single > 3 * own:
        _warn(
            context.ranks,
            f"This CPU multiplies {single / own:.0f} times slower in {str(dtype).removeprefix('torch.')} than in float32. Load "
            "the model in float32 (model.dtype), without another precision of the Trainer, if there is room.",
        )


def warn_of_dense_layers(context: Context) -> None:
    """Name the linear layers that stay dense because they cannot be pruned. Routers are expected to."""
    left = [f"{name} ({reason})" for block in context.layout.blocks for name, reason in block.dense.items()]
    left = [text for text in left if ROUTES not in text]
    if left:
        more = f" and {len(left) - 4} more, which the report names" if len(left) > 4 else ""
        _warn(context.ranks, f"These layers stay dense: {', '.join(left[:4])}{more}.")


def warn_of_pruned_parts(context: Context) -> None:
    """Warn of a model that is sparse in part, as an interrupted run leaves it, and of zeros that the run fills."""
    layers, zeros = layer_rows(context.layout, context.adapter)
    asked = context.config.requested_sparsity
    sparse = [layer["name"] for layer in layers if layer["sparsity"] >= MANY_ZEROS]
    if not sparse:
        return
    if context.config.removes:
        _warn(
            context.ranks,
            f"Pattern {context.config.pattern_name} fits matrices anew, {sparse[0]} for one, and may fill the zeros that they "
            "have. Remove parts of the dense model first.",
        )
    elif zeros > asked + 0.01 and asked:
        _warn(
            context.ranks,
            f"The model has {zeros:.0%} zeros already, more than the {asked:.0%} asked for, and some may be filled. Prune the "
            "dense model, or ask for more. To train a sparse model with its zeros, use SparseFinetuning (model.weights).",
        )
    if len(sparse) < len(layers):
        _warn(
            context.ranks,
            f"{len(sparse)} of {len(layers)} projections have many zeros already, such as {sparse[0]}. If an interrupted run "
            "has left this model half pruned, load the dense model again.",
        )


def _warn(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        warnings.warn(text, stacklevel=4)
