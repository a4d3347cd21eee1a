"""How far a training is, as Prefect shows it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.titles.training_progress import curve, duration, headline, report, seconds_left, title_table


def rows_until(last: int) -> dict[int, dict[str, float]]:
    """A training that validates every second step, takes 3 s a step and 4 s for the first validation."""
    rows: dict[int, dict[str, float]] = {}
    for step in range(last + 1):
        row = {"time/elapsed_s": 4.0 + 3.0 * step}
        if step:
            row |= {"train/reward": 2.0 + 0.1 * step, "train/score": 2.5, "train/matches": 0.75, "train/length": 41.6}
            row |= {"train/trajectories": 23.0, "train/trajectories_dropped": 1.0}
        if step % 2 == 0:
            row |= {"val/reward/mean": 3.0 - 0.1 * (step - 4) ** 2, "val/trajectories_dropped": 2.0}
        rows[step] = row
    return rows


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (0, "Step 0 of 1000 · validation 1.40"),
        (1, "Step 1 of 1000 · reward 2.10 · 50 min left · validation 1.40"),
        # The mean of the last ten steps, 3 to 12.
        (12, "Step 12 of 1000 · reward 2.75 · 49 min left · validation -3.40"),
        (1000, "Step 1000 of 1000 · reward 101.55 · validation -99198.60"),
    ],
)
def test_the_headline(last: int, expected: str) -> None:
    assert headline(rows_until(last), 1000) == expected


def test_before_the_first_step_there_is_nothing_to_say() -> None:
    assert headline({}, 60) == "Starting, 60 steps to go"
    text = report({}, 60, ["MLflow: here"])
    assert text.startswith("## Starting") and "|" not in text and text.endswith("* MLflow: here\n")


def test_the_time_left_goes_by_the_last_steps() -> None:
    assert seconds_left(rows_until(0), 10) is None
    assert seconds_left(rows_until(4), 10) == pytest.approx(18.0)
    slower = {step: {"time/elapsed_s": 3.0 * step + max(0, step - 20) * 7.0} for step in range(31)}
    assert seconds_left(slower, 40) == pytest.approx(100.0)


def test_the_report_has_start_best_and_last_and_what_was_dropped() -> None:
    lines = report(rows_until(6), 10, ["MLflow: [run](there)"]).splitlines()
    header = next(line for line in lines if line.startswith("|"))
    assert header == (
        "|  | training, steps 1 to 3 | training, steps 4 to 6 | validation, step 0 | validation, step 4 (best) | "
        "validation, step 6 |"
    )
    assert "| reward | 2.20 | 2.50 | 1.40 | 3.00 | 2.60 |" in lines
    assert "| supported | 75% | 75% | - | - | - |" in lines and "| length | 42 | 42 | - | - | - |" in lines
    assert "Training reward, steps 1 to 6: `▁▂▄▅▇█`" in lines
    assert lines[-3:] == [
        "* Dropped trajectories: 6 of 144, and 8 in validations", "* Trained for 22 s", "* MLflow: [run](there)",
    ]  # fmt: skip


def test_a_collapse_is_told() -> None:
    rows = rows_until(4)
    rows[3]["train/collapsed"] = rows[4]["train/collapsed"] = 1.0
    assert "collapsed at step 3" in report(rows, 10) and "collapsed" not in report(rows_until(4), 10)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400))
def test_a_curve_is_as_long_as_its_values_up_to_a_line(values: list[float]) -> None:
    drawn = curve(values)
    assert len(drawn) == min(len(values), 60) and set(drawn) <= set("▁▂▃▄▅▆▇█")


def test_a_curve_goes_from_the_lowest_to_the_highest() -> None:
    assert curve([1.0, 2.0, 1.5]) == "▁█▅" and curve([3.0, 3.0]) == "▁▁"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3540, "59 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_titles_come_first_in_their_table() -> None:
    row = {"step": 4, "story_id": "s1", "human_title": "People's", "title": "Ours", "reward": 0.0, "score": 2.345}
    (shown,) = title_table([{**row, "verdict": False, "length": 4}])
    assert list(shown.items()) == [
        ("title", "Ours"), ("reward", 0.0), ("score", 2.35), ("supported", "no"), ("human title", "People's"),
        ("story", "s1"),
    ]  # fmt: skip
