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

    Where one piece contains another, the time is the outer one's alone, unless the inner one is timed `apart`: then
    it is the inner one's alone. So the names' seconds can be added.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._outer: str | None = None

    @contextmanager
    def time(self, name: str, *, apart: bool = False) -> Iterator[None]:
        """Time what happens inside under `name`; no piece that is timed `apart` may contain another."""
        outer = self._outer
        if outer is not None and not apart:
            yield
            return
        self._outer = outer or name
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.seconds[name] += seconds
            if outer is not None:
                self.seconds[outer] -= seconds
            self._outer = outer

    def timed(
        self, name: str, function: Callable[Parameters, Result], *, apart: bool = False
    ) -> Callable[Parameters, Result]:
        """Return `function`, whose calls are timed under `name`."""

        @wraps(function)
        def timed(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
            with self.time(name, apart=apart):
                return function(*arguments, **options)

        return timed
