"""What a run tells whoever watches it: the command line's progress bars, or nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Watcher(Protocol):
    """Hears how far each stage has come."""

    def __call__(self, stage: str, done: float, total: float | None, note: str) -> None:
        """`done` of `total` (None: unknown) of `stage`; a stage is over when both are equal."""
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def tell(stage: str, done: float, total: float | None = None, note: str = "") -> None:
    """Tell the watcher, if there is one."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(stage, done, total, note)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Have `watcher` hear of everything that is run inside."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
