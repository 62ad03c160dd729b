"""The watch over other ranks, with a clock and a store of the test's own. ``test_strategies.py`` stops real processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from sparsellm_lightning.distributed import liveness


class Exited(Exception):
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of the clock, which every round of the watch takes the first of."""
    times: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: times.pop(0) if len(times) > 1 else times[0], sleep=lambda _: None)
    monkeypatch.setattr(liveness, "time", clock)
    return times


def judged(clock: list[float], rounds: list[float], monkeypatch: pytest.MonkeyPatch, count: int = 1) -> Any:
    """Rank 0's watch after rounds at these times, in which it hears nothing, and before them ``count`` signs of life."""
    clock[:] = [0.0, 0.0, *rounds]  # it is made, and begins to judge
    watch = liveness._Watch(HashStore(), 0, 1, "Pruning")
    watch.count = count

    def leave(message: str) -> None:
        raise Exited(message)

    monkeypatch.setattr(watch, "_exit", leave)

    def wait(_: float) -> bool:
        watch.answered = clock[0]  # the store answers
        return len(clock) == 1

    monkeypatch.setattr(watch.left, "wait", wait)
    watch.judge()
    return watch


def test_a_silent_rank_ends_the_run(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exited, match="rank 1 has given no sign of life for 40 seconds"):
        judged(clock, [float(second) for second in range(60)], monkeypatch)


def test_a_rank_that_has_not_come_yet_has_more_time(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still tokenise a long text, or wait for a logger's server."""
    judged(clock, [10.0 * second for second in range(60)], monkeypatch, count=0)
    with pytest.raises(Exited, match="rank 1 has given no sign of life for 600 seconds"):
        judged(clock, [10.0 * second for second in range(80)], monkeypatch, count=0)


def test_a_rank_that_leaves_during_a_round_says_so() -> None:
    """Otherwise the others would take it for a silent one."""
    store = HashStore()
    watch = liveness._Watch(store, 0, 1, "Pruning")
    add, counted = store.add, []

    def leaving(key: str, number: int) -> int:
        counted.append(key)
        if counted.count("1") == 1 and key == "1":  # the first round has told that this rank is still inside
            watch.succeeded = True
            watch.left.set()
        return add(key, number)

    watch.store = SimpleNamespace(add=leaving, check=store.check)
    watch.left.wait = lambda seconds: watch.left.is_set()
    watch.beat()
    assert add("left", 0) == 1


def test_a_run_that_was_suspended_goes_on(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks stood still, so that none has heard another. From then on silence counts again."""
    seconds = [1.0, 2.0, *(1000.0 + second for second in range(30))]
    judged(clock, [*seconds, 0.0], monkeypatch)
    with pytest.raises(Exited, match="no sign of life"):
        judged(clock, [*seconds, *(1030.0 + second for second in range(30))], monkeypatch)
