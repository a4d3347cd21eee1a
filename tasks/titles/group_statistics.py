"""What a batch of trajectory groups amounts to: counts of groups, summaries of numbers, the collapse alarm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.titles.metric_names import SUMMARY_PARTS

# A reward model gives one and the same title scores that differ by about 1e-6 with the batch it came in, so a
# smaller difference than this means nothing: neither a spread inside a group (GRPO divides by the group's
# standard deviation, which would blow noise up to full-sized advantages) nor a better checkpoint.
JUDGE_NOISE = 1e-4

COLLAPSE_GROUPS = 24
"""The collapse alarm compares means over as many steps as hold this many trajectory groups."""
COLLAPSE_SHARE = 0.5


def has_spread(rewards: Sequence[float]) -> bool:
    """Return whether a group's rewards differ by more than the judges' noise."""
    return len(rewards) > 1 and max(rewards) - min(rewards) > JUDGE_NOISE


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """How many groups were asked for, and what became of them: submitted = trainable + without spread + dropped."""

    submitted: int = 0
    trainable: int = 0
    without_spread: int = 0
    dropped: int = 0

    def __add__(self, other: GroupCounts) -> GroupCounts:
        return GroupCounts(
            self.submitted + other.submitted,
            self.trainable + other.trainable,
            self.without_spread + other.without_spread,
            self.dropped + other.dropped,
        )


def count_groups(rewards_by_group: Sequence[Sequence[float]]) -> GroupCounts:
    """Count groups by the rewards of their valid trajectories; fewer than two make a dropped group."""
    dropped = sum(len(rewards) < 2 for rewards in rewards_by_group)
    trainable = sum(has_spread(rewards) for rewards in rewards_by_group)
    submitted = len(rewards_by_group)
    return GroupCounts(submitted, trainable, submitted - dropped - trainable, dropped)


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Return mean, 5th percentile, median, 95th percentile and population standard deviation.

    Percentiles are interpolated linearly between order statistics, as numpy's default is.
    Raises `ValueError` without values.
    """
    if not values:
        raise ValueError("A summary needs at least one value.")
    ordered = sorted(values)
    numbers = (
        statistics.fmean(ordered),
        _quantile(ordered, 0.05),
        _quantile(ordered, 0.5),
        _quantile(ordered, 0.95),
        statistics.pstdev(ordered),
    )
    return dict(zip(SUMMARY_PARTS, numbers, strict=True))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distinct_share(titles_by_group: Sequence[Sequence[str]]) -> float:
    """Return distinct titles per title, averaged over the groups that have any: 1 where all differ."""
    return statistics.fmean(len(set(titles)) / len(titles) for titles in titles_by_group if titles)


def has_collapsed(rewards: Sequence[float], groups_per_step: int) -> bool:
    """Return whether the last steps' mean training reward is under half of the first steps'.

    That is what too high a learning rate looks like. Both windows hold `COLLAPSE_GROUPS` trajectory groups
    and do not overlap; without a positive start there is nothing to fall from.
    """
    window = math.ceil(COLLAPSE_GROUPS / groups_per_step)
    if len(rewards) < 2 * window:
        return False
    start = statistics.fmean(rewards[:window])
    return start > 0 and statistics.fmean(rewards[-window:]) < COLLAPSE_SHARE * start
