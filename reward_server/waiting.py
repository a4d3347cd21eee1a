"""The texts that wait for the model, and which of them are scored next."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tasks.titles.prefixes import Run, common_prefix


@dataclass(eq=False)
class Waiter:
    """One encoded text and the future that its client awaits."""

    tokens: list[int]
    future: asyncio.Future[float]
    number: int
    """The lower, the longer it waits."""
    body: str
    """The article; titles of one are worth waiting for."""
    common: int = field(default=0, init=False)
    """Tokens that it shares with the next waiter in sorted order; `WaitingTexts` keeps it."""


class WaitingTexts:
    """Waiters sorted by their tokens, so that those that begin alike are neighbours."""

    def __init__(self) -> None:
        self.sorted: list[Waiter] = []

    def __len__(self) -> int:
        return len(self.sorted)

    def oldest(self) -> Waiter:
        """Return who waits longest."""
        return min(self.sorted, key=lambda waiter: waiter.number)

    def add(self, waiter: Waiter) -> None:
        """Put `waiter` in its place."""
        place = bisect.bisect(self.sorted, waiter.tokens, key=lambda other: other.tokens)
        self.sorted.insert(place, waiter)
        for left in range(max(place - 1, 0), min(place + 1, len(self.sorted) - 1)):
            first, second = self.sorted[left : left + 2]
            first.common = common_prefix(first.tokens, second.tokens)

    def remove(self, waiters: Collection[Waiter]) -> int:
        """Take those of `waiters` out that are here, and return how many were."""
        gone = set(waiters)
        kept: list[Waiter] = []
        for waiter in self.sorted:
            if waiter not in gone:
                kept.append(waiter)
            elif kept:
                # In sorted order two texts share what every neighbour between them shares.
                kept[-1].common = min(kept[-1].common, waiter.common)
        removed = len(self.sorted) - len(kept)
        self.sorted = kept
        return removed


@dataclass(frozen=True)
class Batch:
    """What is scored together."""

    members: list[int]
    """Indices into the sorted texts."""
    computed: int
    """Tokens that the model reads, padding included."""
    shared: int
    """Tokens that it need not read because texts begin alike."""


def choose_batch(runs: Sequence[Run], lengths: Sequence[int], oldest: int, token_budget: int) -> Batch:
    """Return the texts to score next, given how the waiting ones share prefixes.

    The run of the oldest text is always among them, so that none waits for ever; the others are its neighbours in the
    length of what is read first, so that little is padded. What the model reads at a time, first the stems, then the
    branches, stays within `token_budget` tokens, padding included; only the oldest text may be above it alone.
    """
    by_length = sorted(runs, key=lambda run: (run.shared, run.start))
    low = high = next(place for place, run in enumerate(by_length) if run.start <= oldest < run.end)
    first = by_length[low]
    members, longest, widest = _within(first, lengths, oldest, token_budget)
    branching = int(widest > 0)
    shared = first.shared * (len(members) - 1)
    while True:
        fitting = []
        for place in (low - 1, high + 1):
            if 0 <= place < len(by_length):
                run = by_length[place]
                stems = (high - low + 2) * max(longest, run.shared)
                branches = (branching + run.branches) * max(widest, run.rest)
                if max(stems, branches) <= token_budget:
                    fitting.append((abs(run.shared - first.shared), place))
        if not fitting:
            break
        _, place = min(fitting)
        run = by_length[place]
        members += range(run.start, run.end)
        low, high = min(low, place), max(high, place)
        longest, widest = max(longest, run.shared), max(widest, run.rest)
        branching += run.branches
        shared += run.shared * (run.end - run.start - 1)
    return Batch(sorted(members), (high - low + 1) * longest + branching * widest, shared)


def _within(run: Run, lengths: Sequence[int], oldest: int, token_budget: int) -> tuple[list[int], int, int]:
    """Return as many texts of `run` as `token_budget` allows, the oldest first, and the tokens of stem and branches."""
    members = [oldest]
    rest = lengths[oldest] - run.shared
    for index in range(run.start, run.end):
        more = lengths[index] - run.shared
        if index != oldest and rest + more <= token_budget:
            members.append(index)
            rest += more
    return (members, run.shared, rest) if len(members) > 1 else (members, lengths[oldest], 0)
