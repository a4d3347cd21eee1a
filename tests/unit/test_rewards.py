"""reward = score if the verdict is True, else 0."""

import pytest

from tasks.titles.rewards import reward


@pytest.mark.parametrize(
    ("score", "verdict", "expected"),
    [
        (2.5, True, 2.5),
        (2.5, False, 0.0),
        (0.0, True, 0.0),
        (-1.5, True, -1.5),  # a low score is a low reward: no floor
        (-1.5, False, 0.0),
    ],
)
def test_reward(score: float, verdict: bool, expected: float) -> None:
    assert reward(score, verdict) == expected
