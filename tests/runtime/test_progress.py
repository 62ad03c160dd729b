"""Loops show how far they are where that is asked for, and nowhere else."""

from __future__ import annotations

import sys

import pytest

from sparsellm_lightning.runtime import progress, showing, tracked


def test_log_files_get_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked(range(3), "Counting", "number")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    with showing(True):
        assert list(tracked(iter("ab"), "Counting", "number")) == ["a", "b"]
        with showing(False):
            assert list(tracked("c", "Silent", "number")) == ["c"]
    assert capsys.readouterr().err == "Counting: done in 0 s\n"


def test_terminals_get_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "draws_bars", lambda: True)
    with showing(True):
        assert list(tracked(range(3), "Counting", "number")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "Counting" in shown
    assert "/3" in shown
    assert not sys.stderr.isatty()
