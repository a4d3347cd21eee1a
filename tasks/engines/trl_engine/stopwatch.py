"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Stopwatch:
    """Adds up the seconds that functions take, each under a name.

    Where one timed function calls another, the time is the outer one's alone, so that the names' seconds can be
    added. A function that is timed as a `part` counts in any case, besides.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running = False

    def __getitem__(self, name: str) -> float:
        """Return the seconds under `name` since the last reset."""
        return self._seconds[name]

    def reset(self) -> None:
        """Begin at 0 again."""
        self._seconds.clear()

    def timed(
        self, name: str, function: Callable[Parameters, Result], *, part: bool = False
    ) -> Callable[Parameters, Result]:
        """Return `function`, whose calls are timed under `name`."""

        @wraps(function)
        def timed(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
            if self._running and not part:
                return function(*arguments, **options)
            outermost = not self._running
            self._running = True
            started = time.monotonic()
            try:
                return function(*arguments, **options)
            finally:
                self._seconds[name] += time.monotonic() - started
                if outermost:
                    self._running = False

        return timed
