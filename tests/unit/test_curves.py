"""A run's curve over what it spent, and where the time of a step went."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.engines.journal import Journal
from tasks.titles.config import load_profile
from tasks.titles.curves import CurvePoint, TimeSplit, curve, time_per_step
from tasks.titles.errors import CheckpointError

ROWS = {
    0: {"val/reward/mean": 1.0, "time/eval_s": 2.0},
    1: {
        "train/trajectories": 47.0,
        "train/tokens": 600.0,
        "train/reward": 1.1,
        "time/elapsed_s": 12.0,
        "time/rollout_s": 5.0,
        "time/judge_s": 1.0,
        "time/train_s": 3.0,
        "time/step_s": 9.0,
    },
    2: {
        "train/trajectories": 48.0,
        "train/tokens": 500.0,
        "train/reward": 1.3,
        "val/reward/mean": 1.5,
        "time/elapsed_s": 30.0,
        "time/rollout_s": 7.0,
        "time/judge_s": 2.0,
        "time/train_s": 4.0,
        "time/step_s": 11.0,
    },
}


@pytest.fixture
def rows(tmp_path: Path) -> dict[int, dict[str, float]]:
    """The rows as a journal gives them back."""
    journal = Journal(tmp_path / "journal.jsonl")
    for step, metrics in ROWS.items():
        journal.append(step, metrics)
    return journal.rows()


def test_the_curve_adds_up_what_was_spent(rows: dict[int, dict[str, float]]) -> None:
    profile = load_profile("starter-gpu", ["engine=trl", "devices=2", "price_per_device_hour=3.6"])
    assert curve(rows, profile) == [
        CurvePoint(0, 0, 0, 0.0, 0.0, 0.0, None, 1.0),
        CurvePoint(1, 47, 600, 12.0, 24.0, pytest.approx(0.024), 1.1, None),
        CurvePoint(2, 95, 1100, 30.0, 60.0, pytest.approx(0.060), 1.3, 1.5),
    ]


def test_without_a_price_there_is_no_cost(rows: dict[int, dict[str, float]]) -> None:
    assert {point.cost for point in curve(rows, load_profile("starter"))} == {None}


def test_the_four_parts_of_a_step_add_up_to_it(rows: dict[int, dict[str, float]]) -> None:
    assert time_per_step(rows) == TimeSplit(write=4.5, judge=1.5, train=3.5, other=0.5)


def test_a_row_that_lacks_a_metric_is_named(rows: dict[int, dict[str, float]]) -> None:
    del rows[2]["train/tokens"], rows[1]["time/judge_s"]
    with pytest.raises(CheckpointError, match=r"Step 2 .* no 'train/tokens'"):
        curve(rows, load_profile("starter"))
    with pytest.raises(CheckpointError, match=r"Step 1 .* no 'time/judge_s'"):
        time_per_step(rows)
    with pytest.raises(CheckpointError, match="no step yet"):
        time_per_step({0: ROWS[0]})
