"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Stopwatch:
    """Adds up the seconds of pieces of work, each under a name.

    Where one piece contains another, the time is the outer one's alone, so that the names' seconds can be added. A
    piece that is timed as a `part` counts in any case, besides.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running = False

    @contextmanager
    def time(self, name: str, *, part: bool = False) -> Iterator[None]:
        """Time what happens inside under `name`."""
        if self._running and not part:
            yield
            return
        outermost = not self._running
        self._running = True
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - started
            if outermost:
                self._running = False

    def timed(
        self, name: str, function: Callable[Parameters, Result], *, part: bool = False
    ) -> Callable[Parameters, Result]:
        """Return `function`, whose calls are timed under `name`."""

        @wraps(function)
        def timed(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
            with self.time(name, part=part):
                return function(*arguments, **options)

        return timed
