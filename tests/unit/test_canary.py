"""What the canary makes of two parties' log-probabilities."""

from __future__ import annotations

from math import inf, nan
from statistics import fmean

import numpy as np
import pytest

from tasks.engines.canary import STANDARD_ERRORS, CanaryCheck, compare, nearer_to_the_new
from tasks.titles import metric_names as names
from tasks.titles.errors import SamplerDisagrees

TOKENS, ROUNDING, MOVED = 350, 0.03, 0.05
"""Tokens of the canary; standard deviations, in nats, of what bfloat16 leaves unsure and of what an update moves."""
SEEDS = range(200)


def check(sampled: list[float | None], trained: list[float], tokens: int = 3) -> CanaryCheck:
    return compare(sampled, trained, tokens=tokens, sampler="the sampler", tolerance=0.05)


def test_a_mean_up_to_the_tolerance_passes_whatever_a_single_token_does() -> None:
    checked = check([-1.0, -2.0, -3.0], [-1.01, -2.12, -3.01])
    assert checked.mean_difference == pytest.approx(0.14 / 3)
    assert checked.max_difference == pytest.approx(0.12)
    assert checked.metrics() == {
        names.CANARY_MEAN_DIFFERENCE: checked.mean_difference,
        names.CANARY_MAX_DIFFERENCE: checked.max_difference,
    }


@pytest.mark.parametrize(
    ("sampled", "trained", "told"),
    [
        ([-1.0, -2.0, -3.0], [-1.04, -2.06, -3.06], "3 tokens .* 0.0533 nats apart .* at most 0.05 are allowed"),
        ([-1.0, -2.0, -3.0], [-1.0, -2.5, -3.04], "Token 2 .* -2.0000 for the sampler and -2.5000 in the trainer"),
        ([-1.0, nan, -3.0], [-1.0, -2.0, -3.0], "inf nats apart .* Token 2"),
        ([-1.0, -2.0, -3.0], [-1.0, -2.0, nan], "inf nats apart .* Token 3"),
        ([-1.0, None, -3.0], [-1.0, -2.0, -3.0], "inf nats apart .* Token 2"),
        ([-inf, -2.0, -3.0], [-inf, -2.0, -3.0], "inf nats apart .* Token 1"),
        ([-1.0, -2.0], [-1.0, -2.0, -3.0], "2 log-probabilities from the sampler and 3 from the trainer; 3 were"),
        ([-1.0, -2.0, -3.0], [], "3 log-probabilities from the sampler and 0 from the trainer; 3 were"),
    ],
)
def test_everything_else_stops_the_run(sampled: list[float | None], trained: list[float], told: str) -> None:
    with pytest.raises(SamplerDisagrees, match=told):
        check(sampled, trained)


def test_a_title_without_tokens_proves_nothing() -> None:
    with pytest.raises(SamplerDisagrees, match="at least one"):
        check([], [], tokens=0)


def answers(seed: int, moved: float) -> list[list[float]]:
    """Return the server's answers with the old and the new weights, and the trainer's before and after the update.

    The more certain a token, the less both rounding and an update change it; one in a hundred answers is far off.
    """
    chance = np.random.default_rng(seed)
    unsure = chance.exponential(size=TOKENS) * (chance.random(TOKENS) > 0.25)
    old = chance.uniform(-10, 0, size=TOKENS)
    new = old + moved * unsure * chance.normal(size=TOKENS)
    far_off = (chance.random((4, TOKENS)) < 0.01) * chance.choice((-0.6, 0.6), size=(4, TOKENS))
    return (np.array([old, new, old, new]) + ROUNDING * unsure * chance.normal(size=(4, TOKENS)) + far_off).tolist()


def follows(served: list[float], before: list[float], after: list[float]) -> bool:
    try:
        compare(served, after, before=before, tokens=TOKENS, sampler="the server of policy@2", tolerance=0.2)
    except SamplerDisagrees as told:
        assert "The server of policy@2 has not followed the trainer:" in str(told)
        return False
    return True


@pytest.mark.parametrize("moved", [0.0, 0.005, MOVED, 2 * MOVED])
def test_a_server_that_follows_passes_whatever_an_update_has_moved(moved: float) -> None:
    for seed in SEEDS:
        _, new, before, after = answers(seed, moved)
        assert follows(new, before, after), seed


@pytest.mark.parametrize(
    ("moved", "stopped"),
    [
        (0.005, (0, 0)),  # rounding hides the update, and nothing is concluded
        (MOVED, (0.25, 1)),  # some of the first steps stop a run whose server stays one behind
        (2 * MOVED, (1, 1)),
    ],
)
def test_a_server_one_update_behind_stops_the_run(moved: float, stopped: tuple[float, float]) -> None:
    made = [answers(seed, moved) for seed in SEEDS]
    share = fmean(not follows(old, before, after) for old, _, before, after in made)
    assert stopped[0] <= share <= stopped[1]


def test_a_bias_of_the_rounding_is_not_taken_for_an_old_adapter() -> None:
    chance = np.random.default_rng(3)
    before = chance.uniform(-10, 0, size=TOKENS)
    after = before - 0.001 * chance.random(TOKENS)
    served = after + 0.02 + 0.03 * chance.normal(size=TOKENS)
    found = nearer_to_the_new(served.tolist(), before.tolist(), after.tolist())
    assert found and found[0] < 0.5 - STANDARD_ERRORS * found[1], "the statistic alone would stop the run"
    assert follows(served.tolist(), before.tolist(), after.tolist())


@pytest.mark.parametrize(("moved", "may_go_on"), [(1e-6, True), (1e-3, False)])
def test_a_server_equal_to_the_bit_is_old_only_if_the_trainer_moved_by_more_than_rounding(
    moved: float, may_go_on: bool
) -> None:
    chance = np.random.default_rng(5)
    before = chance.uniform(-10, 0, size=TOKENS)
    after = before + moved * chance.normal(size=TOKENS)
    assert follows(before.tolist(), before.tolist(), after.tolist()) == may_go_on


def test_updates_that_rounding_hides_are_told_once_they_have_added_up() -> None:
    chance = np.random.default_rng(4)
    trainer = chance.uniform(-10, 0, size=TOKENS)
    anchor, left_behind = trainer.tolist(), (trainer + ROUNDING * chance.normal(size=TOKENS)).tolist()
    direction = chance.normal(size=TOKENS)
    told = [follows(left_behind, anchor, (trainer + 0.002 * update * direction).tolist()) for update in range(1, 30)]
    assert told[:3] == [True] * 3 and not any(told[-10:])


def test_the_standard_error_is_the_spread_of_what_chance_makes() -> None:
    far = []
    for seed in range(1000):
        _, new, before, after = answers(seed, 0.0)
        found = nearer_to_the_new(new, before, after)
        assert found is not None
        far.append((found[0] - 0.5) / found[1])
    assert abs(fmean(far)) < 0.12
    assert fmean(one**2 for one in far) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("served", "after", "share"),
    [
        ([-1.0, -2.0], [-1.0, -2.0], None),  # the trainer has not moved
        ([-1.1, -2.2], [-1.1, -2.2], 1.0),
        ([-1.0, -2.0], [-1.1, -2.2], 0.0),
        ([-1.1, -2.0], [-1.1, -2.2], 1 / 3),  # the token that moved more weighs two, the other one
        ([-1.5, -2.1], [-1.0, -2.2], None),  # the same distance, as far as is known
    ],
)
def test_tokens_weigh_by_rank(served: list[float], after: list[float], share: float | None) -> None:
    found = nearer_to_the_new(served, [-1.0, -2.0], after)
    assert (found and found[0]) == (share and pytest.approx(share))


def test_few_tokens_never_stop_a_run() -> None:
    moved = [-1.0 - token for token in range(32)]
    still = [-2.0 - token for token in range(32)]
    checked = compare(still, moved, before=still, tokens=32, sampler="the sampler", tolerance=2)
    assert checked.followed == 0
    with pytest.raises(SamplerDisagrees, match="not followed"):
        compare([*still, -60.0], [*moved, -59.0], before=[*still, -60.0], tokens=33, sampler="it", tolerance=2)
