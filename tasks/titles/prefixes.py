"""Which sequences of tokens are computed on top of one common prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHARED_SHARE = 0.5
"""Sequences share a prefix only where it is at least this share of each of them: two articles under one
system message have little in common, and short pieces make slow matrix products."""
LONGEST_RUN = 64
"""Sequences on one prefix; more would save next to nothing more and take long to divide."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours in sorted order, from `start` up to `end` (exclusive), computed on top of one prefix."""

    start: int
    end: int
    shared: int
    """Tokens of the prefix; of a sequence that stays alone, all of its tokens."""
    rest: int
    """Tokens behind the prefix, summed over the sequences; 0 where one stays alone."""

    @property
    def branches(self) -> bool:
        """Whether several sequences share the prefix."""
        return self.end - self.start > 1


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return with how many equal tokens two sequences of one type begin."""
    # Slices are compared in C, and all together are no longer than the shorter sequence.
    equal, end = 0, min(len(left), len(right))
    while equal < end:
        middle = (equal + end + 1) // 2
        if left[equal:middle] == right[equal:middle]:
            equal = middle
        else:
            end = middle - 1
    return equal


def best_runs(lengths: Sequence[int], common: Sequence[int], copies: Sequence[int] | None = None) -> list[Run]:
    """Divide sorted sequences into runs so that the fewest tokens are computed.

    `lengths` are in tokens, `common[i]` are the tokens that sequence i shares with sequence i + 1, and `copies` how
    often each is continued (default: once). In sorted order the longest common prefixes are between neighbours, so the
    best grouping is a division of that order; dynamic programming finds it. A sequence that stays alone is read once
    for all its copies; in a run of several each copy reads its own rest.
    """
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(lengths) + 1):
        options = [(best[end - 1][0] + lengths[end - 1], end - 1)]
        shared = least = longest = lengths[end - 1]
        number = 1 if copies is None else copies[end - 1]
        rests = number * shared
        for start in range(end - 2, max(end - 1 - LONGEST_RUN, -1), -1):
            length = lengths[start]
            least, longest = min(least, length), max(longest, length)
            # Every sequence keeps a token of its own: what follows it is read there.
            shared = min(shared, common[start], least - 1)
            if shared < SHARED_SHARE * longest or shared < 1:
                break
            more = 1 if copies is None else copies[start]
            rests += more * length
            number += more
            options.append((best[start][0] + shared + rests - number * shared, start))
        best.append(min(options))
    runs = []
    end = len(lengths)
    while end:
        start = best[end][1]
        shared = lengths[start]
        if end - start > 1:
            shared = min(*common[start : end - 1], *(length - 1 for length in lengths[start:end]))
        runs.append(Run(start, end, shared, sum(lengths[start:end]) - shared * (end - start)))
        end = start
    return runs[::-1]
