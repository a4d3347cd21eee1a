"""Bootstrap intervals: what must hold for any values, and that they cover what is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tasks.titles.statistics import (
    Interval,
    crossed_difference,
    crossed_interval,
    crossed_ratio,
    crossed_win_rate,
    mean_interval,
    paired_difference,
    paired_ratio,
    seed_stretch,
)

VALUES = st.lists(st.floats(-100, 100, allow_nan=False), min_size=1, max_size=40)
PAIRS = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=40)
OPTIONS = {"samples": 200, "seed": 5}
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 15))
TABLES = SHAPES.flatmap(lambda shape: arrays(np.float64, shape, elements=st.floats(-50, 50)))


def ends(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


@given(VALUES, st.integers(0, 2**32 - 1))
def test_interval_lies_inside_the_values_and_repeats(values: list[float], seed: int) -> None:
    first = mean_interval(values, samples=200, seed=seed)
    assert first == mean_interval(values, samples=200, seed=seed)
    slack = 1e-9
    assert min(values) - slack <= first.low <= first.high <= max(values) + slack
    assert first.mean == pytest.approx(np.mean(values), abs=1e-9)


@given(VALUES, st.floats(-10, 10))
def test_a_shift_of_all_values_shifts_the_interval(values: list[float], shift: float) -> None:
    plain = mean_interval(values, samples=200, seed=3)
    shifted = mean_interval([value + shift for value in values], samples=200, seed=3)
    for name in ("mean", "low", "high"):
        assert getattr(shifted, name) == pytest.approx(getattr(plain, name) + shift, abs=1e-8)


@given(PAIRS)
def test_swapping_the_pair_mirrors_the_difference(pairs: list[tuple[float, float]]) -> None:
    after, before = zip(*pairs, strict=True)
    forward = paired_difference(after, before, samples=200, seed=5)
    backward = paired_difference(before, after, samples=200, seed=5)
    assert backward.mean == pytest.approx(-forward.mean, abs=1e-9)
    assert backward.low == pytest.approx(-forward.high, abs=1e-9)
    assert backward.high == pytest.approx(-forward.low, abs=1e-9)


def test_the_mean_is_covered_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        interval = mean_interval(generator.normal(2.0, 1.0, size=60).tolist(), samples=400, seed=trial)
        covered += interval.low <= 2.0 <= interval.high
    # 400 trials at 0.95 have a standard error of 0.011; the percentile bootstrap covers a little less than 0.95.
    assert 0.90 <= covered / 400 <= 0.98


def test_a_known_difference_between_pairs_is_covered_although_stories_vary_far_more() -> None:
    generator = np.random.default_rng(1)
    covered, widths, unpaired_widths = 0, [], []
    for trial in range(200):
        story = generator.normal(0, 3.0, size=80)
        before = story + generator.normal(0, 0.2, size=80)
        after = story + 0.3 + generator.normal(0, 0.2, size=80)
        interval = paired_difference(after.tolist(), before.tolist(), samples=300, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
        widths.append(interval.high - interval.low)
        alone = mean_interval(after.tolist(), samples=300, seed=trial)
        unpaired_widths.append(alone.high - alone.low)
    assert 0.88 <= covered / 200 <= 0.99
    assert np.mean(widths) < np.mean(unpaired_widths) / 5


def test_ratio_of_means_and_its_interval() -> None:
    generator = np.random.default_rng(2)
    before = generator.uniform(1.0, 3.0, size=300)
    ratio = paired_ratio((before * 1.4).tolist(), before.tolist(), samples=500, seed=1)
    assert ratio is not None
    assert ratio.mean == pytest.approx(1.4)
    assert ratio.low == pytest.approx(1.4) and ratio.high == pytest.approx(1.4)
    assert paired_ratio([1.0, 2.0], [0.0, 0.0], samples=100, seed=1) is None
    assert paired_ratio([1.0, 2.0], [-1.0, 2.0], samples=100, seed=1) is None
    assert paired_ratio([4.0], [2.2e-308], samples=100, seed=1) is None


def test_one_story_has_no_spread() -> None:
    assert mean_interval([0.7], samples=100, seed=1) == Interval(0.7, 0.7, 0.7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([], samples=100, seed=1), "at least one story"),
        (lambda: mean_interval([1.0, float("nan")], samples=100, seed=1), "finite"),
        (lambda: paired_difference([1.0], [1.0, 2.0], samples=100, seed=1), "same stories"),
    ],
)
def test_wrong_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@given(PAIRS)
def test_one_seed_agrees_with_the_intervals_over_stories(pairs: list[tuple[float, float]]) -> None:
    after, before = zip(*pairs, strict=True)
    assert ends(crossed_interval([after], **OPTIONS)) == pytest.approx(ends(mean_interval(after, **OPTIONS)), abs=1e-9)
    assert crossed_difference([after], [before], **OPTIONS) == paired_difference(after, before, **OPTIONS)
    assert crossed_ratio([after], [before], **OPTIONS) == paired_ratio(after, before, **OPTIONS)


@given(TABLES)
def test_equal_seeds_are_as_good_as_one(table: np.ndarray) -> None:
    # Rows that are alike have no spread over seeds, and the stories drawn do not depend on how many seeds there are.
    alike = np.repeat(table[:1], len(table), axis=0)
    one = ends(crossed_interval(table[:1], **OPTIONS))
    assert ends(crossed_interval(alike, **OPTIONS)) == pytest.approx(one, abs=1e-9)


@given(TABLES, st.floats(-10, 10))
def test_a_shift_of_the_table_shifts_its_interval_and_is_a_certain_difference(table: np.ndarray, shift: float) -> None:
    plain, shifted = (crossed_interval(each, **OPTIONS) for each in (table, table + shift))
    assert ends(shifted) == pytest.approx([end + shift for end in ends(plain)], abs=1e-8)
    assert ends(crossed_difference(table + shift, table, **OPTIONS)) == pytest.approx([shift] * 3, abs=1e-8)


@given(TABLES)
def test_win_rates_of_both_sides_add_up_to_one(table: np.ndarray) -> None:
    other = table[::-1]
    forward, backward = (crossed_win_rate(*pair, tie=0.5, **OPTIONS) for pair in ((table, other), (other, table)))
    assert 0 <= forward.low <= forward.mean <= forward.high <= 1
    assert backward.mean == pytest.approx(1 - forward.mean)
    assert backward.low == pytest.approx(1 - forward.high)


@given(TABLES)
def test_one_row_stands_for_every_seed(table: np.ndarray) -> None:
    repeated = np.repeat(table[:1], len(table), axis=0)
    assert crossed_difference(table, table[:1], **OPTIONS) == crossed_difference(table, repeated, **OPTIONS)


def test_missing_values_are_left_out_and_never_a_zero() -> None:
    nan = np.nan
    table = [[2.0, nan, 4.0, nan], [2.0, 6.0, nan, nan]]
    assert crossed_interval(table, **OPTIONS).mean == 3.5
    # Only (first seed, first story) has both values.
    difference = crossed_difference(table, [[1.0, nan, nan, 5.0], [nan, nan, 3.0, 5.0]], **OPTIONS)
    assert difference == Interval(1.0, 1.0, 1.0)
    assert crossed_win_rate([[1.0, 1.0, nan]], [[0.0, 1.0, 5.0]], tie=1e-4, **OPTIONS).mean == 0.75


def test_a_ratio_over_seeds_and_stories() -> None:
    generator = np.random.default_rng(2)
    before = generator.uniform(1.0, 3.0, size=(1, 80))
    after = before * np.array([[1.3], [1.4], [1.5]])
    ratio = crossed_ratio(after, before, **OPTIONS)
    assert ratio is not None and ratio.mean == pytest.approx(1.4)
    assert ratio.low < 1.3 and ratio.high > 1.5  # three seeds that spread like this promise little of a fourth
    assert crossed_ratio(after, before - 3, **OPTIONS) is None


def test_the_stretch_makes_a_mean_of_seeds_as_wide_as_student_does() -> None:
    assert seed_stretch(1) == 1
    # sqrt(n / (n - 1)) times the two-sided 95% points of Student's t over the normal distribution's
    for seeds, student in ((3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262), (31, 2.042)):
        assert seed_stretch(seeds) == pytest.approx((seeds / (seeds - 1)) ** 0.5 * student / 1.960, rel=0.035)
    assert seed_stretch(1000) == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("of_seeds", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_of_nothing_is_rarely_called_real(seeds: int, of_seeds: float) -> None:
    """Whatever part of the spread is the seeds'. Without the stretch it is 24% and 14% where it is much of it."""
    generator = np.random.default_rng(4)
    alarms = 0
    for trial in range(300):
        luck = generator.normal(0, of_seeds, size=(seeds, 1)) + generator.normal(0, 1.0, size=(1, 60))
        before = generator.normal(2.0, 3.0, size=(1, 60))
        after = before + luck + generator.normal(0, 1.0, size=(seeds, 60))
        alarms += crossed_difference(after, before, samples=300, seed=trial).excludes_zero
    # 300 trials at 0.05 have a standard error of 0.013.
    assert alarms / 300 <= 0.09


def test_a_real_difference_between_seeds_is_seen() -> None:
    generator = np.random.default_rng(5)
    seen = 0
    for trial in range(100):
        before = generator.normal(2.0, 3.0, size=(1, 100))
        after = before + 0.9 + generator.normal(0, 0.1, size=(3, 1)) + generator.normal(0, 1.0, size=(3, 100))
        seen += crossed_difference(after, before, samples=300, seed=trial).low > 0
    assert seen >= 98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossed_interval([[np.nan]], **OPTIONS), "at least one story"),
        (lambda: crossed_interval([[1.0, np.inf]], **OPTIONS), "finite"),
        (lambda: crossed_interval([1.0, 2.0], **OPTIONS), "two dimensions"),
        (lambda: crossed_difference([[1.0]], [[1.0, 2.0]], **OPTIONS), "same stories and seeds"),
        (lambda: crossed_difference([[1.0]] * 2, [[1.0]] * 3, **OPTIONS), "same stories and seeds"),
    ],
)
def test_wrong_tables_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
