"""``on_accelerator.py`` in a process of its own: a backend stays registered with torch until its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_an_accelerator(chosen: str, models_dir: Path) -> None:
    pytest.importorskip("torch._C._acc", reason="this torch has no backends in Python")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        chosen,
        "--basetemp",
        models_dir.parent / f"accelerator {chosen}",
        "accelerator/on_accelerator.py",
    ]
    environment = {**os.environ, "PYTEST_XDIST_WORKER": "accelerator"}  # so that it shares the trained models
    run = subprocess.run([*map(str, command)], cwd=TESTS, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
