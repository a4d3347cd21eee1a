"""The seconds of a step's parts can be added: none is counted twice."""

from __future__ import annotations

import pytest

from tasks.engines import stopwatch
from tasks.engines.stopwatch import Stopwatch


class Clock:
    """Stands still but for `pass_`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> float:
        self.now += seconds
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(stopwatch, "time", own)
    return own


def test_the_outer_function_has_the_time_and_a_part_is_counted_besides(clock: Clock) -> None:
    watch = Stopwatch()
    sleep = watch.timed("sleep", clock.pass_, part=True)
    sync = watch.timed("sync", lambda: (clock.pass_(4.0), sleep(1.0)))

    def generate() -> float:
        sync()
        return clock.pass_(2.0)

    write = watch.timed("write", generate)
    assert write() == 7.0
    assert [watch.seconds[name] for name in ("write", "sync", "sleep")] == [7.0, 0.0, 1.0]
    sync()
    assert [watch.seconds[name] for name in ("write", "sync", "sleep")] == [7.0, 5.0, 2.0]
    watch.seconds.clear()
    assert [watch.seconds[name] for name in ("write", "sync", "sleep")] == [0.0, 0.0, 0.0]
    # A part by itself does not keep others from being timed.
    sleep(3.0)
    sync()
    assert [watch.seconds[name] for name in ("sync", "sleep")] == [5.0, 4.0]


def test_an_error_ends_the_time_too(clock: Clock) -> None:
    watch = Stopwatch()

    def fail() -> None:
        clock.pass_(2.0)
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            watch.timed("save", fail)()
    assert watch.seconds["save"] == 4.0
