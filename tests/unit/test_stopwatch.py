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


def test_the_outer_function_has_the_time_but_for_what_is_timed_apart(clock: Clock) -> None:
    watch = Stopwatch()
    sleep = watch.timed("sleep", clock.pass_, apart=True)
    sync = watch.timed("sync", lambda: (clock.pass_(4.0), sleep(1.0)))

    def generate() -> float:
        sync()
        return clock.pass_(2.0)

    def seconds() -> list[float]:
        return [watch.seconds[name] for name in ("write", "sync", "sleep")]

    write = watch.timed("write", generate)
    assert write() == 7.0
    assert seconds() == [6.0, 0.0, 1.0]
    sync()
    assert seconds() == [6.0, 4.0, 2.0]
    assert sum(seconds()) == clock.now, "nothing is counted twice and nothing left out"
    watch.seconds.clear()
    assert seconds() == [0.0, 0.0, 0.0]
    # By itself it does not keep others from being timed.
    sleep(3.0)
    sync()
    assert seconds() == [0.0, 4.0, 4.0]


def test_an_error_ends_the_time_too(clock: Clock) -> None:
    watch = Stopwatch()

    def fail() -> None:
        clock.pass_(2.0)
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            watch.timed("save", fail)()
    assert watch.seconds["save"] == 4.0
