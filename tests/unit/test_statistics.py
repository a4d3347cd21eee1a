"""Bootstrap intervals: what must hold for any values, and that they cover what is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.titles.statistics import Interval, mean_interval, paired_difference, paired_ratio

VALUES = st.lists(st.floats(-100, 100, allow_nan=False), min_size=1, max_size=40)
PAIRS = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=40)


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
