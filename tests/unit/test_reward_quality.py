"""The figures of a reward model, against values computed by hand and against their definitions."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.reward_training.calibration_picture import draw_calibration
from tasks.reward_training.quality import Decile, deciles, pairwise, quality

LOG2, LOG4 = math.log(2), math.log(4)
scores = st.integers(-5, 10_000)
guesses = st.floats(-3, 12)
stories = st.lists(st.tuples(guesses, scores), min_size=1, max_size=40)


def test_figures_against_values_computed_by_hand() -> None:
    # Labels 0, log 2, log 4, log 4; errors 1, 0, 0, -1.
    found = quality([1.0, LOG2, LOG4, LOG4 - 1], [1, 2, 4, 4], train_mean=LOG2)
    assert found.stories == 4
    assert found.rmse == pytest.approx(math.sqrt(2 / 4))
    assert found.rmse_baseline == pytest.approx(math.sqrt(3 * LOG2**2 / 4))
    # Predictions rank 3, 2, 4, 1 (1.0, 0.693, 1.386, 0.386) against labels 1, 2, 3.5, 3.5.
    assert found.spearman == pytest.approx(-0.5 / math.sqrt(5 * 4.5))
    # Pairs (better, worse): (2, 1) wrong, (4, 1) right, (4, 1) wrong, (4, 2) right, (4, 2) wrong.
    assert (found.pairs, found.pairwise_accuracy) == (5, pytest.approx(2 / 5))
    # Four stories make four parts; each lies as far off as its prediction.
    assert [part.stories for part in found.deciles] == [1, 1, 1, 1]
    assert found.calibration_error == pytest.approx(2 / 4)


def test_deciles_against_values_computed_by_hand() -> None:
    predicted = [float(number) for number in range(20)]
    found = deciles(predicted[::-1], [2 * value for value in predicted[::-1]])
    assert found == tuple(Decile(2, 2 * number + 0.5, 4 * number + 1) for number in range(10))


@pytest.mark.parametrize(
    ("predicted", "upvotes", "expected"),
    [
        ([0.0, 1.0], [1, 2], (1, 1)),
        ([1.0, 0.0], [1, 2], (0, 1)),
        ([1.0, 1.0], [1, 2], (0.5, 1)),  # undecided
        ([0.0, 1.0], [10, 19], (0, 0)),  # less than twice
        ([0.0, 1.0], [0, 1], (0, 0)),  # below 1 counts as 1
        ([0.0, 1.0], [-3, 2], (1, 1)),
    ],
)
def test_what_a_pair_is(predicted: list[float], upvotes: list[int], expected: tuple[float, int]) -> None:
    assert pairwise(predicted, upvotes) == expected


@given(stories)
def test_pairwise_is_what_comparing_every_two_stories_gives(found: list[tuple[float, int]]) -> None:
    right, pairs = 0.0, 0
    for one, other in combinations(found, 2):
        low, high = sorted((one, other), key=lambda story: story[1])
        if max(high[1], 1) >= 2 * max(low[1], 1):
            pairs += 1
            right += 1.0 if high[0] > low[0] else 0.5 if high[0] == low[0] else 0.0
    assert pairwise([guess for guess, _ in found], [score for _, score in found]) == (right, pairs)


@given(stories)
def test_deciles_share_out_every_story_and_keep_the_means(found: list[tuple[float, int]]) -> None:
    predicted = [guess for guess, _ in found]
    labels = [float(score) for _, score in found]
    parts = deciles(predicted, labels)
    sizes = [part.stories for part in parts]
    assert sum(sizes) == len(found) and max(sizes) - min(sizes) <= 1
    assert [part.predicted for part in parts] == pytest.approx(sorted(part.predicted for part in parts))
    assert sum(part.stories * part.observed for part in parts) == pytest.approx(sum(labels), abs=1e-6)
    assert sum(part.stories * part.predicted for part in parts) == pytest.approx(sum(predicted), abs=1e-6)


@given(stories)
@example([(0.1, 1), (0.1, 2), (0.1, 3)])  # their standard deviation is not quite 0
def test_every_figure_can_be_stored(found: list[tuple[float, int]]) -> None:
    """Whatever has no value (no spread, no pair) is left out of the metrics and null in JSON; nothing is NaN."""
    figures = quality([guess for guess, _ in found], [score for _, score in found], train_mean=2.0)
    json.dumps(figures.as_dict(), allow_nan=False)
    metrics = figures.metrics("test")
    assert all(name.startswith("test/") and math.isfinite(value) for name, value in metrics.items())
    assert ("test/pairwise_accuracy" in metrics) is (figures.pairs > 0)
    assert metrics["test/calibration/decile_01/observed"] == figures.deciles[0].observed


@pytest.mark.parametrize(
    ("predicted", "upvotes"), [([], []), ([1.0], [1, 2]), ([math.nan, 1.0], [1, 2]), ([math.inf], [1])]
)
def test_predictions_that_are_none_are_refused(predicted: list[float], upvotes: list[int]) -> None:
    with pytest.raises(ValueError, match="finite predictions"):
        quality(predicted, upvotes, train_mean=1.0)


def test_the_picture_shows_every_split(tmp_path) -> None:
    found = quality([0.0, 1.0, 2.0], [1, 3, 9], train_mean=1.0)
    draw_calibration({"train": found}, tmp_path / "one.png")
    draw_calibration({"train": found, "test": quality([3.0, 1.0], [1, 3], train_mean=1.0)}, tmp_path / "two.png")
    one, two = (tmp_path / name for name in ("one.png", "two.png"))
    assert one.read_bytes().startswith(b"\x89PNG") and one.read_bytes() != two.read_bytes()
