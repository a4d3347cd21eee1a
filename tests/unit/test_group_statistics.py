"""Counts of groups, summaries and the collapse alarm."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.titles.group_statistics import (
    JUDGE_NOISE,
    GroupCounts,
    count_groups,
    distinct_share,
    has_collapsed,
    has_spread,
    summarise,
)

numbers = st.floats(-100, 100)
groups = st.lists(st.lists(numbers, max_size=6), max_size=8)


@pytest.mark.parametrize(
    ("rewards", "spread"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.0, 1.0], False),
        ([0.0, 0.0], False),
        ([2.0, 2.0 + 1e-6], False),  # one title in two batches of the reward model
        ([0.0, 0.5], True),
        ([-1.0, 1.0, 1.0], True),
    ],
)
def test_spread(rewards: list[float], spread: bool) -> None:
    assert has_spread(rewards) is spread


def test_counts_of_a_batch() -> None:
    batch = [[1.0, 2.0], [0.0, 0.0, 0.0], [1.0], [], [0.5, 0.0, 0.5]]
    assert count_groups(batch) == GroupCounts(submitted=5, trainable=2, without_spread=1, dropped=2)


@given(groups)
def test_every_group_is_counted_once(batch: list[list[float]]) -> None:
    counts = count_groups(batch)
    assert counts.submitted == len(batch)
    assert counts.trainable + counts.without_spread + counts.dropped == counts.submitted
    assert counts.dropped == sum(len(rewards) < 2 for rewards in batch)


@given(groups, groups)
def test_counts_add_up_over_batches(one: list[list[float]], other: list[list[float]]) -> None:
    assert count_groups(one) + count_groups(other) == count_groups(one + other)


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_spread_does_not_depend_on_order_or_level(rewards: list[float], level: float) -> None:
    width = max(rewards) - min(rewards)
    if abs(width - JUDGE_NOISE) > 1e-9:
        assert has_spread(rewards) == has_spread(rewards[::-1]) == has_spread([reward + level for reward in rewards])


@given(st.lists(numbers, min_size=1, max_size=50))
def test_summary_agrees_with_numpy(values: list[float]) -> None:
    expected = {
        "mean": numpy.mean(values),
        "p5": numpy.percentile(values, 5),
        "median": numpy.median(values),
        "p95": numpy.percentile(values, 95),
        "std_dev": numpy.std(values),
    }
    assert summarise(values) == pytest.approx(expected, abs=1e-6)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_distinct_share() -> None:
    assert distinct_share([["a", "b", "c"]]) == 1.0
    assert distinct_share([["a", "a", "a", "a"], ["a", "b"], []]) == pytest.approx((0.25 + 1.0) / 2)


@pytest.mark.parametrize(
    ("rewards", "collapsed"),
    [
        ([2.0] * 5 + [0.5] * 5, True),
        ([2.0] * 5 + [1.1] * 5, False),
        ([2.0] * 5 + [0.1] * 4, False),  # nine steps: the windows would overlap
        ([2.0] * 5 + [0.1] * 20 + [3.0] * 5, False),  # recovered
        ([1.0, 3.0, 2.0, 2.0, 2.0, 3.0, 3.0, 0.0, 0.0, 0.1, 0.2, 0.0], True),
        ([0.0] * 10, False),
        ([-1.0] * 5 + [-4.0] * 5, False),  # no positive start to fall from
    ],
)
def test_collapse_alarm(rewards: list[float], collapsed: bool) -> None:
    assert has_collapsed(rewards, groups_per_step=5) is collapsed  # windows of 5 steps, 25 groups


def test_the_collapse_alarm_looks_at_as_many_groups_however_large_a_step_is() -> None:
    fallen = [2.0] * 3 + [0.5] * 3
    assert has_collapsed(fallen, groups_per_step=8)
    assert not has_collapsed(fallen, groups_per_step=7)  # windows of 4 steps would overlap
    assert not has_collapsed([2.0] * 24 + [0.5] * 23, groups_per_step=1)
    assert has_collapsed([2.0] * 24 + [0.5] * 24, groups_per_step=1)


def test_nan_never_makes_a_group_trainable() -> None:
    assert not has_spread([math.nan, 1.0])
