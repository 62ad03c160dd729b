"""Prune a model in place, with or without a Trainer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sparsellm_lightning.architectures import describe, device_of
from sparsellm_lightning.calibration import (
    add_written_windows,
    equally_many,
    fitted_windows,
    held_out_windows,
    take_windows,
)
from sparsellm_lightning.config import PruningConfig
from sparsellm_lightning.generation import rewrite_windows
from sparsellm_lightning.journal import Journal, fingerprint
from sparsellm_lightning.placement import format_bytes
from sparsellm_lightning.products import coarse_dtype
from sparsellm_lightning.report import PruningReport, layer_rows, peak_memory
from sparsellm_lightning.stopwatch import gemm_peak
from sparsellm_lightning.strategies import StrategyAdapter
from sparsellm_lightning.walker import Walker

# Of the progress bar, in one phase, at least: forward and statistics take turns with every batch, but a long phase must be seen
# as soon as it begins.
SECONDS_A_DRAW = 0.5


def prune_model(
    model: PreTrainedModel,
    calibration_batches: Iterable[Any],
    config: PruningConfig,
    *,
    adapter: StrategyAdapter | None = None,
    sharded: bool = False,
    journal_dir: str | Path | None = None,
    progress: bool = False,
    on_iteration: Callable[[int, int, float], None] | None = None,
) -> PruningReport:
    """Prune the projections of a causal LM's decoder blocks, in place.

    Args:
        model: a ``transformers`` model whose architecture is in the table; parameters are edited in place, in their dtype.
        calibration_batches: dicts with ``input_ids`` (batch, sequence) and optionally ``attention_mask``, whose padded
            positions are left out of every statistic; or tensors of token ids. The first
            ``config.num_calibration_samples`` windows (rows) are used.
        config: what to prune and how.
        adapter: of the strategy the model runs under; a single device by default.
        sharded: the batches are already this rank's own (only matters with several ranks).
        journal_dir: note every finished block there. A run that was killed and starts again with the same model, windows and
            settings goes on at the first unfinished block, and ends with the same weights.
        progress: show a progress bar over blocks.
        on_iteration: see :class:`~sparsellm_lightning.walker.Walker`.

    Returns:
        the report; its ``perplexity`` entries are None (see :func:`sparsellm_lightning.perplexity`).

    Raises:
        UserError: the model, the batches or the settings do not fit together; before any long work.
        NumericalError: NaN or infinity in activations, or a Gram matrix that cannot be factored.
    """
    adapter = adapter or StrategyAdapter()
    layout = describe(model, config)
    adapter.check(layout)
    start = time.perf_counter()
    device = device_of(model)
    results, tokens = [], 0
    with adapter.ranks.failing_together(), adapter.calibrating(model):
        # A shuffled dataloader draws from the global generator; the state is put back afterwards.
        torch.manual_seed(config.seed)
        batches, windows = take_windows(
            calibration_batches,
            config.num_calibration_samples,
            adapter.ranks,
            device,
            sharded=sharded,
            batch_tokens=config.batch_tokens(adapter.ranks.size),
        )
        if windows < config.num_calibration_samples:
            _warn(
                adapter,
                f"num_calibration_samples is {config.num_calibration_samples}, but the dataloader gave {windows} windows.",
            )
        bar = tqdm(
            total=len(layout.blocks), desc="Pruning", unit="block", disable=not progress or adapter.ranks.rank > 0
        )
        status: dict[str, str] = {}
        drawn: dict[str | None, float] = {}  # when each phase was, last

        def show(**news: str) -> None:
            status.update(news)
            phase, now = status.get("phase"), time.monotonic()
            if not bar.disable and now - drawn.get(phase, -math.inf) >= SECONDS_A_DRAW:
                drawn[phase] = now
                bar.set_postfix(status, memory=format_bytes(peak_memory(device)))

        def on_error(block: int, iteration: int, error: float) -> None:
            show(error=f"{error:.4f}")
            if on_iteration is not None:
                on_iteration(block, iteration, error)

        journal = None
        if journal_dir is not None:
            journal = Journal(journal_dir, fingerprint(layout, batches, config, adapter.ranks), adapter)
        walker = Walker(layout, config, adapter, on_error, lambda phase: show(phase=phase))
        fitted = fitted_windows(windows, config.held_out_share, adapter.ranks)
        written = 0
        if config.continuations and config.requested_sparsity > 0:
            dtype = coarse_dtype(device, config.solver_precision == "float32")

            def write(ids: Tensor, names: list[str]) -> Tensor:
                seeds = [f"{config.seed}/{name}" for name in names]
                rewrite = partial(rewrite_windows, model, ids, seeds, adapter, dtype)
                return rewrite() if journal is None else journal.remember("written-windows", rewrite).to(device)

            with walker.stopwatch.phase("generation"):
                batches, fitted, written = add_written_windows(
                    batches, fitted, config.continuations, write, adapter.ranks, device
                )
        if adapter.forward_is_collective:
            batches = equally_many(batches, adapter.ranks, device)
        tokens = walker.enter(batches, fitted)
        widest = max(p.shape[1] for p in layout.projections() if p.pruned)
        if tokens < widest:
            _warn(
                adapter,
                f"{tokens} calibration tokens are fewer than the {widest} input features of the widest projection: its "
                "statistics are rank-deficient. Use more or longer windows.",
            )
        with bar:
            for result in walker.walk(journal):
                results.append(result)
                bar.update()
        adapter.finish(model)
        seconds = time.perf_counter() - start
        dtypes = {str(d).removeprefix("torch."): d for counts in walker.stopwatch.work.values() for d in counts}
        peaks = {name: gemm_peak(device, dtype) for name, dtype in dtypes.items()}
    work = {
        phase: {str(dtype).removeprefix("torch."): float(count) for dtype, count in counts.items()}
        for phase, counts in walker.stopwatch.work.items()
    }
    layers, achieved = layer_rows(layout, adapter, {k: v for r in results for k, v in r.layer_errors.items()})
    return PruningReport(
        model=model.config.name_or_path or type(model).__name__,
        method=config.method,
        pattern=config.pattern,
        sparsity={"requested": config.requested_sparsity, "achieved": achieved},
        perplexity={"dense": None, "pruned": None},
        layers=layers,
        blocks=[{k: v for k, v in asdict(r).items() if k != "layer_errors"} for r in results],
        calibration={
            "windows": windows,
            "held_out": held_out_windows(windows, config.held_out_share),
            "written": written,
            "tokens": tokens,
        },
        phases=walker.stopwatch.seconds,
        work=work,
        gemm_peak=peaks,
        wall_seconds=seconds,
        peak_memory_bytes=peak_memory(device),
        config=asdict(config),
    )


def _warn(adapter: StrategyAdapter, message: str) -> None:
    if adapter.ranks.rank == 0:
        warnings.warn(message, stacklevel=3)
