"""What the canary makes of two parties' log-probabilities."""

from __future__ import annotations

from math import inf, nan

import pytest

from tasks.engines.canary import largest_difference
from tasks.titles.errors import SamplerDisagrees


def difference(sampled: list[float | None], trained: list[float], tokens: int = 3) -> float:
    return largest_difference(sampled, trained, tokens=tokens, sampler="the sampler", tolerance=0.05)


def test_the_largest_difference_is_returned_up_to_the_tolerance() -> None:
    assert difference([-1.0, -2.0, -3.0], [-1.01, -2.04, -3.0]) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("sampled", "trained", "told"),
    [
        ([-1.0, -2.0, -3.0], [-1.0, -2.06, -3.04], "token 2 .* -2.0000 for the sampler and -2.0600 in the trainer"),
        ([-1.0, nan, -3.0], [-1.0, -2.0, -3.0], "token 2 .* inf nats apart"),
        ([-1.0, -2.0, -3.0], [-1.0, -2.0, nan], "token 3 .* inf nats apart"),
        ([-1.0, None, -3.0], [-1.0, -2.0, -3.0], "token 2 .* inf nats apart"),
        ([-inf, -2.0, -3.0], [-inf, -2.0, -3.0], "token 1 .* inf nats apart"),
        ([-1.0, -2.0], [-1.0, -2.0, -3.0], "2 log-probabilities from the sampler and 3 from the trainer; 3 were"),
        ([-1.0, -2.0, -3.0], [], "3 log-probabilities from the sampler and 0 from the trainer; 3 were"),
    ],
)
def test_everything_else_stops_the_run(sampled: list[float | None], trained: list[float], told: str) -> None:
    with pytest.raises(SamplerDisagrees, match=told):
        difference(sampled, trained)


def test_a_title_without_tokens_proves_nothing() -> None:
    with pytest.raises(SamplerDisagrees, match="at least one"):
        difference([], [], tokens=0)
