"""Kill a training with ART without warning, run the same command, and end where an uninterrupted one ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from resume_parts import assert_mlflow_has_each_metric_once, assert_same_runs
from train_and_die import sit
from training_parts import request

from tasks.engines.resume import checkpoints_folder, journal_of, stored_state

STEPS = 10
HERE = Path(__file__).parent


async def sitting(run_dir: Path, url: str, *death: str | int) -> int:
    """Train in a process of its own; return its exit code, negative for a signal."""
    with (run_dir.parent / "log.txt").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *map(str, [HERE / "train_and_die.py", run_dir, url, STEPS, *death]),
            stdout=log,
            stderr=log,
            cwd=HERE.parents[1],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        )
        return await process.wait()


def seen(run_dir: Path) -> dict[int, list[list[str]]]:
    """Return each step's batches as its last attempt drew them."""
    batches: dict[int, list[list[str]]] = {}
    last = 0
    for line in (run_dir / "seen.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] != last or row["stories"] in batches.get(last, []):
            batches[row["step"]] = []
        batches[row["step"]].append(row["stories"])
        last = row["step"]
    return batches


@pytest.mark.slow
async def test_a_killed_run_ends_like_a_straight_one(tmp_path: Path, reward_server_url: str) -> None:
    straight, killed = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    straight.mkdir(parents=True)
    killed.mkdir(parents=True)
    await sit(request(straight, reward_server_url, max_steps=STEPS, eval_steps=3))

    # Five steps and a death in the sixth, just before its commit; the same command, and one just after a commit.
    deaths = [("row", 6, 5), ("committed", 8, 8)]
    for moment, step, survives in deaths:
        assert await sitting(killed, reward_server_url, moment, step) == -signal.SIGKILL, (
            tmp_path / "killed/log.txt"
        ).read_text()
        state = stored_state(killed, "art")
        assert state is not None
        assert state.cursor.step == survives, moment
    assert (checkpoints_folder(killed, "art") / "0008" / "cursor.json").exists()
    assert await sitting(killed, reward_server_url) == 0

    assert seen(killed) == seen(straight)
    assert sorted(seen(straight)) == list(range(1, STEPS + 1))
    assert_same_runs(straight, killed, "art", STEPS)
    assert_mlflow_has_each_metric_once(killed, "art")


async def test_a_kill_among_the_rollouts_of_the_first_step(tmp_path: Path, reward_server_url: str) -> None:
    run_dir = tmp_path / "killed" / "run"
    run_dir.mkdir(parents=True)
    assert await sitting(run_dir, reward_server_url, "rollouts", 1) == -signal.SIGKILL
    assert sorted(journal_of(run_dir).rows()) == [0]
    asked = request(run_dir, reward_server_url, max_steps=1, eval_steps=3)
    await sit(asked)
    assert sorted(journal_of(run_dir).rows()) == [0, 1]
    assert_mlflow_has_each_metric_once(run_dir, "art")
