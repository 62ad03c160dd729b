"""The entry: prune a model in place, with or without a Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm_lightning.calibration import Context, check_finite_weights, works_under_autocast
from sparsellm_lightning.config import PruningConfig, preset_settings
from sparsellm_lightning.data import (
    CalibrationBatch,
    equally_many,
    fitted_windows,
    held_out_windows,
    regrouped,
    rewrite_windows,
    split_windows,
    take_windows,
    written_windows,
)
from sparsellm_lightning.distributed import StrategyAdapter
from sparsellm_lightning.errors import OutOfMemoryError, UserError
from sparsellm_lightning.models import check_inputs, model_inputs
from sparsellm_lightning.pipeline.admission import (
    check_adapters_untrained,
    check_place,
    warn_of_dense_layers,
    warn_of_few_tokens,
    warn_of_idle_settings,
    warn_of_pruned_parts,
    warn_of_slow_products,
    without_predictions,
)
from sparsellm_lightning.pipeline.distil import Distiller
from sparsellm_lightning.pipeline.kept import STEP_TOKENS
from sparsellm_lightning.pipeline.resume import Journal
from sparsellm_lightning.pipeline.sequential import OnIteration, prune_blocks
from sparsellm_lightning.reporting import RESTORED, BlockResult, PruningReport, layer_rows
from sparsellm_lightning.runtime import (
    BlockProgress,
    MemoryMeter,
    Profile,
    claimed,
    explaining_memory,
    gemm_peak,
    phase,
    showing,
)

_Done = TypeVar("_Done")


def prune_model(
    model: PreTrainedModel,
    calibration_batches: Iterable[Any],
    config: PruningConfig,
    *,
    adapter: StrategyAdapter | None = None,
    sharded: bool = False,
    keep_zeros: bool = False,
    resume_dir: str | Path | None = None,
    progress: bool = False,
    on_iteration: OnIteration = lambda block, iteration, error: None,
    on_block: Callable[[BlockResult], None] = lambda result: None,
) -> PruningReport:
    """Prune the projections of a causal LM's decoder blocks, in place.

    Args:
        model: any causal language model of ``transformers``. Parameters are edited in place, in their dtype.
        calibration_batches: dicts with ``input_ids`` (batch, sequence) and optionally ``attention_mask``, whose padded
            positions are left out of every statistic; or tensors of token ids. The first ``config.num_calibration_samples``
            windows (rows) are used.
        config: what to prune and how. Neurons, heads and blocks become zeros here. A Trainer's ``export_dir`` leaves them out.
        adapter: of the strategy the model runs under. None: a single device.
        sharded: whether the batches are this rank's own share already.
        keep_zeros: weights that are zero already are pruned first, so that the new mask contains the old one.
        resume_dir: folder that keeps the weights of finished blocks. A run that was killed and starts again with the same
            model, windows and settings goes on at the first unfinished block, and ends with the same weights.
        progress: show a progress bar over blocks.
        on_iteration: called with (block index, iteration, error), see
            :data:`~sparsellm_lightning.pipeline.sequential.OnIteration`.
        on_block: called with the result of every finished block.

    Returns:
        the report. Its perplexities are None (see :func:`sparsellm_lightning.perplexity`).

    Raises:
        UserError: the model, the batches or the settings do not fit together, before any long work. Later: no room in memory
            (OutOfMemoryError) or in ``resume_dir``, or a pattern or budget that the measured model cannot meet.
        NumericalError: NaN or infinity in weights or activations, or a Gram matrix that cannot be factored.
    """
    start = time.perf_counter()
    adapter = adapter or StrategyAdapter()
    check_place(model)
    layout = adapter.describe(model, config)
    config = without_predictions(layout, config, adapter)
    if keep_zeros and config.removes:
        raise UserError(
            f"keep_zeros keeps zeros of matrices, but pattern {config.pattern_name} fits anew what is left of them. Remove "
            "parts first, then prune with keep_zeros."
        )
    context = Context(layout, config, adapter, keep_zeros)
    adapter.check(context.layout)
    memory = MemoryMeter(context.device)
    progress = progress and adapter.ranks.rank == 0
    shown = BlockProgress(len(context.layout.blocks), context.device, progress)
    profile = Profile(context.device, shown.phase)

    def iteration_done(block: int, iteration: int, error: float) -> None:
        shown.error(error)
        on_iteration(block, iteration, error)

    results: list[BlockResult] = []
    resume_dir = None if resume_dir is None else Path(resume_dir).expanduser()
    writes = resume_dir is not None and adapter.ranks.rank == 0
    claim = claimed(resume_dir or "", "resume_dir") if writes else nullcontext()
    with (
        adapter.ranks.failing_together(),
        claim,
        adapter.calibrating(model),
        profile.collecting(),
        shown.bar,
        showing(progress),
    ):
        check_adapters_untrained(context)
        context = replace(context, autocasts=works_under_autocast(context))
        # A shuffled dataloader draws from the global generator, whose state is restored at the end.
        torch.manual_seed(config.seed)
        batches, windows = take_windows(
            _checked(model, calibration_batches),
            config.num_calibration_samples,
            adapter.ranks,
            context.device,
            sharded=sharded,
            batch_tokens=STEP_TOKENS // adapter.ranks.size if config.tunes else None,
        )
        journal = None if resume_dir is None else Journal(resume_dir, context, batches)
        fitted = fitted_windows(sum(batch.windows for batch in batches), config.held_out_fraction, adapter.ranks)
        written, number_written = _written_windows(context, batches, fitted, journal)
        (tokens,) = adapter.ranks.total(sum(batch.tokens for batch in batches))
        check_finite_weights(context, dict(model.named_parameters()))
        warn_of_idle_settings(context)
        warn_of_few_tokens(context, windows, tokens)
        warn_of_slow_products(context)
        warn_of_dense_layers(context)
        if not keep_zeros:
            warn_of_pruned_parts(context)
        distiller = _distiller(context, batches, fitted, written)
        for_blocks = _for_blocks(context, batches, fitted, written)
        for result in prune_blocks(context, *for_blocks, journal, iteration_done):
            results.append(result)
            shown.block()
            on_block(result)
        if distiller is not None:
            _distilling(context, distiller.tune, "ends its distillation early")
        adapter.finish(model)
        restored = 0.0 if journal is None else journal.restored_seconds
        seconds = time.perf_counter() - start + restored
        dtypes = {dtype for counts in profile.work.values() for dtype in counts}
        peaks = {_name(dtype): gemm_peak(context.device, dtype) for dtype in dtypes}
        return _report(
            context,
            results,
            profile,
            distillation=None if distiller is None else distiller.kept or None,
            calibration={
                "windows": windows,
                "held_out": held_out_windows(windows, config.held_out_fraction),
                "written": number_written,
                "tokens": tokens,
            },
            phases=profile.seconds | ({RESTORED: restored} if restored else {}),
            gemm_peak=peaks,
            wall_seconds=seconds,
            peak_memory_bytes=memory.peak(),
            added_memory_bytes=memory.added(),
        )


def _report(context: Context, results: Sequence[BlockResult], profile: Profile, **measured: Any) -> PruningReport:
    """Fields of the report that the blocks, the profile and the weights give, and those that were ``measured``.

    All ranks call this together, because they count zeros.
    """
    config, model = context.config, context.layout.model
    errors: dict[str, float | None] = {name: error for r in results for name, error in r.layer_errors.items()}
    layers, achieved = layer_rows(context.layout, context.adapter, errors)
    return PruningReport(
        model=model.config.name_or_path or type(model).__name__,
        method=config.method,
        pattern=config.pattern_name,
        sparsity={"requested": config.requested_sparsity, "achieved": achieved},
        perplexity={"dense": None, "pruned": None},
        layers=layers,
        blocks=[
            {k: v for k, v in asdict(result).items() if k != "layer_errors"} | {"dense": block.dense}
            for result, block in zip(results, context.layout.blocks, strict=True)
        ],
        work={
            name: {_name(dtype): float(count) for dtype, count in counts.items()}
            for name, counts in profile.work.items()
        },
        config=asdict(config),
        dtype=_name(model.dtype),
        **measured,
    )


def _checked(model: PreTrainedModel, batches: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
    """The model's arguments in every batch, refused if the model cannot take them."""
    for batch in batches:
        inputs = model_inputs(batch)
        check_inputs(model, inputs)
        yield inputs


def _written_windows(
    context: Context, batches: list[CalibrationBatch], fitted: int, journal: Journal | None
) -> tuple[list[CalibrationBatch], int]:
    """The windows that the model writes after this rank's fitted windows, and their number over all ranks."""
    config = context.config
    if not config.continuations or config.requested_sparsity == 0:
        return [], 0

    def write(ids: Tensor, names: list[str], copy: int) -> Tensor:
        seeds = [f"{config.seed}/{name}" for name in names]
        dtype = context.autocast_dtype or torch.float32
        rewrite = partial(
            rewrite_windows, context.layout.model, ids, seeds, context.adapter, dtype, from_random_tokens=copy > 0
        )
        return rewrite() if journal is None else journal.remember(f"written-windows-{copy}", rewrite).to(context.device)

    ahead = split_windows(batches, fitted)[0]
    with phase("generation"):
        written, number = written_windows(ahead, config.continuations, write, context.ranks, context.device)
    (wanted,) = context.ranks.total(config.continuations * fitted)
    if number < wanted and context.ranks.rank == 0:
        warnings.warn(
            f"continuations asks for {wanted} written windows, but there are {number}: only windows without padding, as long "
            "as the longest, are continued. Give windows of one length.",
            stacklevel=3,
        )
    return written, number


def _for_blocks(
    context: Context, batches: list[CalibrationBatch], fitted: int, written: list[CalibrationBatch]
) -> tuple[list[CalibrationBatch], int]:
    """This rank's windows for the blocks, and the number of them that are fitted, some of which the model has written.

    Without written windows the blocks fit text of other kinds much worse. With all of them some models fit the calibration text
    worse (see recipes/RESULTS.md).
    """
    ahead, behind = split_windows(batches, fitted)
    copies = max(context.config.continuations, 1)
    last = written[len(written) - len(written) // copies :]  # one for each calibration window
    (number,) = context.ranks.total(len(last))
    # The first half over all ranks, which take turns, so that the choice does not depend on their number.
    some = [w for index, w in enumerate(last) if 2 * (context.ranks.rank + index * context.ranks.size) < number]
    windows = [*ahead, *regrouped(some, STEP_TOKENS // context.ranks.size), *behind] if some else batches
    if context.adapter.forward_is_collective:
        windows = equally_many(windows, context.ranks, context.device)
    return windows, fitted + len(some)


def _distiller(
    context: Context, batches: list[CalibrationBatch], fitted: int, written: list[CalibrationBatch]
) -> Distiller | None:
    """What tunes all blocks at the end. None if nothing asks for it, or it cannot be done."""
    if not context.config.distillation_steps or context.config.requested_sparsity == 0:
        return None
    return _distilling(context, lambda: Distiller(context, batches, fitted, written), "goes without distillation")


def _distilling(context: Context, do: Callable[[], _Done], otherwise: str) -> _Done | None:
    """A part of the distillation. None, with a warning, if only the preset asks for it and it cannot be done."""
    config = context.config
    try:
        with phase("distillation"), explaining_memory(partial(_explain_distillation, context)):
            return do()
    except UserError as error:
        one_rank_alone = isinstance(error, OutOfMemoryError) and context.ranks.size > 1  # the others would wait for it
        preset = preset_settings(config.preset, config.num_calibration_samples)
        if one_rank_alone or config.distillation_steps != preset["distillation_steps"]:
            raise
        if context.ranks.rank == 0:
            warnings.warn(f"Preset {config.preset} {otherwise}: {error}", stacklevel=4)
        return None


def _explain_distillation(context: Context) -> str:
    lower = "set memory to fewer bytes, to keep the moments on the host, " * (context.device.type != "cpu")
    return (
        "Distillation keeps the gradients and Adam's moments of all kept weights, and the activations of a step of about "
        f"{STEP_TOKENS} tokens, at least one window. Set distillation_steps to 0, {lower}or shard the model over more "
        "devices."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
