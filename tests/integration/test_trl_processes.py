"""TRL on two processes, here on one CPU: the same titles, updates and journal as on one, and none is left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import descendants
from resume_parts import METRIC_TOLERANCE, assert_same_weights, without_times
from training_parts import request, titles_of, train_with_trl

from tasks.engines.contract import Progress, TrainingRequest
from tasks.engines.resume import adapter_folder, journal_of
from tasks.engines.trl_engine import launch
from tasks.titles.errors import RunStopped, TooManyFailures
from tasks.titles.metric_names import TRAIN_ENTROPY

STEPS = 2
# The one group of a step reaches over both processes, and so do three validation stories.
ASKED: dict[str, Any] = {
    "engine": "trl",
    "group_size": 6,
    "groups_per_step": 1,
    "max_steps": STEPS,
    "eval_steps": 1,
    "trl": {"micro_batch": 3},
}


def worker(rank: int) -> psutil.Process:
    """Return the trainer's process of that rank."""
    running = [psutil.Process(pid) for pid in descendants(os.getpid())]
    [found] = [one for one in running if one.environ().get("RANK") == str(rank)]
    return found


def compared(asked: TrainingRequest) -> dict[int, dict[str, float]]:
    """Return the journal without what depends on how the titles are dealt to passes.

    TRL's entropy is the mean of its passes, however many tokens each has.
    """
    rows = without_times(journal_of(asked.run_dir).rows())
    return {step: {name: row[name] for name in row if name != TRAIN_ENTROPY} for step, row in rows.items()}


@pytest.fixture
def two(tmp_path: Path, reward_server_url: str) -> TrainingRequest:
    return request(tmp_path / "two", reward_server_url, **ASKED, devices=2)


async def test_two_processes_make_the_run_of_one_even_where_one_of_them_is_killed(
    two: TrainingRequest, tmp_path: Path, reward_server_url: str
) -> None:
    before = descendants(os.getpid())
    heard: list[int] = []

    def kill(progress: Progress) -> None:
        heard.append(progress.step)
        if progress.step == 1:
            worker(1).send_signal(signal.SIGKILL)

    with pytest.raises(RunStopped, match="the same command continues from the last checkpoint"):
        await train_with_trl(two, on_progress=kill)
    assert heard == [0, 1]
    assert descendants(os.getpid()) == before
    result = await train_with_trl(two, on_progress=kill)
    assert (heard, result.steps) == ([0, 1, 2], STEPS)
    assert descendants(os.getpid()) == before

    one = request(tmp_path / "one", reward_server_url, **ASKED)
    await train_with_trl(one)
    assert compared(one) == {
        step: pytest.approx(row, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE) for step, row in compared(two).items()
    }
    assert_same_weights(*(adapter_folder(asked.run_dir, "trl", STEPS) for asked in (one, two)))
    for kind, step in (("rollouts", 1), ("rollouts", 2), ("validation", 0), ("validation", 2)):
        alone, shared = (titles_of(asked.run_dir, kind, step) for asked in (one, two))
        assert [row["title"] for row in alone] == [row["title"] for row in shared]
        assert [row["reward"] for row in alone] == pytest.approx(
            [row["reward"] for row in shared], abs=METRIC_TOLERANCE
        )
    # One of the processes tells of a step.
    log = (two.run_dir / launch.LOG).read_text()
    assert log.count(f"Step {STEPS} of {STEPS}") == 1


@pytest.mark.slow
async def test_all_processes_stop_for_the_reason_of_one(two: TrainingRequest) -> None:
    before = descendants(os.getpid())
    gone = TrainingRequest(**{**vars(two), "reward_model_url": "http://127.0.0.1:9"})
    with pytest.raises(TooManyFailures, match="reward model: ServiceUnavailable"):
        await train_with_trl(gone)
    assert descendants(os.getpid()) == before
