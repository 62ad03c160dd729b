"""Plots show the numbers of the report, and only the panels and lines that it has numbers for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from sparsellm_lightning import PruningReport
from sparsellm_lightning.reporting.plots import layers_figure, save_plots, stages_figure


def report_of(blocks: list[dict[str, Any]], sparsities: tuple[float, float] = (0.7, 0.7)) -> PruningReport:
    layers = [
        {"name": f"model.layers.{block}.{kind}", "shape": [4, 4], "sparsity": sparsity, "error": error}
        for block in (0, 1)
        for kind, sparsity, error in (
            ("self_attn.q_proj", sparsities[0], 0.1 + block),
            ("mlp.up_proj", sparsities[1], None if block else 0.2),
        )
    ]
    return PruningReport(
        model="tiny",
        method="sparsellm",
        pattern="unstructured",
        sparsity={"requested": 0.7, "achieved": 0.7},
        perplexity={},
        layers=layers,
        blocks=blocks,
        calibration={},
        phases={},
        wall_seconds=1.0,
        peak_memory_bytes=None,
        added_memory_bytes=None,
        config={},
    )


def block_of(index: int, errors: list[float], held_out: list[float], reconstruction: Any = None) -> dict[str, Any]:
    return {"index": index, "errors": errors, "held_out_errors": held_out, "reconstruction": reconstruction}


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}


def test_stages_show_the_error_after_each_stage() -> None:
    report = report_of(
        [
            # The second iterate is the best on held-out tokens, the third on fitted ones.
            block_of(
                0, [0.4, 0.3, 0.2], [0.5, 0.41, 0.42], {"steps": 8, "fitted": [0.3, 0.1], "held_out": [0.35, 0.2]}
            ),
            block_of(1, [0.6], [0.7], {"steps": 0, "fitted": [0.5, 0.4], "held_out": [0.55, 0.45]}),
        ]
    )
    figure = stages_figure(report)
    assert figure is not None
    feed_forward, whole = figure.axes
    assert lines(feed_forward) == {
        "local solver, fitted tokens": [(0, 0.4), (1, 0.6)],
        "local solver, held-out tokens": [(0, 0.5), (1, 0.7)],
        "alternation, fitted tokens": [(0, 0.3)],
        "alternation, held-out tokens": [(0, 0.41)],
    }
    assert lines(whole) == {
        "before reconstruction, fitted tokens": [(0, 0.3), (1, 0.5)],
        "before reconstruction, held-out tokens": [(0, 0.35), (1, 0.55)],
        "after reconstruction, fitted tokens": [(0, 0.1), (1, 0.4)],
        "after reconstruction, held-out tokens": [(0, 0.2), (1, 0.45)],
    }
    assert feed_forward.get_yscale() == whole.get_yscale() == "log"


def test_without_held_out_tokens_the_iterate_is_chosen_on_fitted_tokens() -> None:
    rebuilt = {"steps": 8, "fitted": [0.3, 0.1], "held_out": [None, None]}
    figure = stages_figure(report_of([block_of(0, [0.4, 0.2, 0.3], [], rebuilt)]))
    assert figure is not None
    feed_forward, whole = figure.axes
    assert lines(feed_forward) == {"local solver, fitted tokens": [(0, 0.4)], "alternation, fitted tokens": [(0, 0.2)]}
    assert lines(whole) == {
        "before reconstruction, fitted tokens": [(0, 0.3)],
        "after reconstruction, fitted tokens": [(0, 0.1)],
    }


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    one_iteration = stages_figure(report_of([block_of(0, [0.4], []), block_of(1, [], [])]))
    assert one_iteration is not None
    assert [lines(axes) for axes in one_iteration.axes] == [{"local solver, fitted tokens": [(0, 0.4)]}]
    # A block that a local solver solves has no errors of the alternation.
    tuned = stages_figure(report_of([block_of(0, [], [], {"steps": 8, "fitted": [0.3, 0.1], "held_out": [0.4, 0.2]})]))
    assert tuned is not None
    assert [axes.get_ylabel() for axes in tuned.axes] == ["relative error of the block's output"]
    assert stages_figure(report_of([block_of(0, [], [])])) is None
    assert save_plots(report_of([]), tmp_path) == [tmp_path / "layers.png"]
    exact = report_of([block_of(0, [0.0], [])])  # 0 has no logarithm
    assert save_plots(exact, tmp_path) == [tmp_path / "stages.png", tmp_path / "layers.png"]


@pytest.mark.parametrize(("attention", "limits"), [(0.7, (-2, 102)), (0.6, (59, 71)), (0.0, (-2, 102))])
def test_the_axis_zooms_in_on_pruned_layers_whose_sparsities_differ(
    attention: float, limits: tuple[float, float]
) -> None:
    figure = layers_figure(report_of([], (attention, 0.7)))
    zeros, errors = figure.axes
    assert lines(zeros)["q_proj"] == [(0, 100 * attention), (1, 100 * attention)]
    assert lines(zeros)["up_proj"] == [(0, 70), (1, 70)]
    assert zeros.get_ylim() == pytest.approx(limits)
    shown = lines(errors)
    assert shown["q_proj"] == [(0, 0.1), (1, 1.1)]
    assert shown["up_proj"][0] == (0, 0.2)
    assert str(shown["up_proj"][1][1]) == "nan"  # a projection left dense has no error
