"""End a training with TRL in every way that there is, run the same call, and end where an uninterrupted one ends."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from processes import descendants, wait_until_gone
from resume_parts import METRIC_TOLERANCE, assert_mlflow_has_each_metric_once, assert_same_runs
from training_parts import request, titles_of, train_with_trl

from tasks.engines.contract import Progress, TrainingRequest
from tasks.engines.resume import stored_state
from tasks.engines.trl_engine import launch
from tasks.titles.errors import RunStopped

STEPS = 10
ASKED = {"engine": "trl", "max_steps": STEPS, "eval_steps": 1, "trl": {"micro_batch": 2}}
HERE = Path(__file__).parent
# What a flow does, in a process that a test can kill.
FLOW = f"""
import asyncio, sys
from pathlib import Path
from training_parts import request, train_with_trl
asyncio.run(train_with_trl(request(Path(sys.argv[1]), sys.argv[2], **{ASKED})))
"""


def committed(asked: TrainingRequest) -> int:
    state = stored_state(asked.run_dir, "trl")
    return -1 if state is None else state.cursor.step


@pytest.fixture
def python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes import this project and what stands beside this file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [HERE.parents[1], HERE])))


async def kill_the_flow(asked: TrainingRequest, url: str) -> None:
    """Kill the process that started the trainer, in the middle of a step; the trainer must notice by itself."""
    asked.run_dir.mkdir(parents=True)
    with (asked.run_dir / "flow.log").open("wb") as log:
        flow = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FLOW, str(asked.run_dir), url, stdout=log, stderr=log
        )
    while committed(asked) < 1:
        assert flow.returncode is None, (asked.run_dir / "flow.log").read_text()
        await asyncio.sleep(0.1)
    trainer = descendants(flow.pid)
    flow.kill()
    await flow.wait()
    assert len(trainer) >= 1
    for pid in trainer:
        await asyncio.to_thread(wait_until_gone, pid)
    assert committed(asked) < STEPS, "the trainer has gone on to its own end"


async def cancel(asked: TrainingRequest, caplog: pytest.LogCaptureFixture) -> None:
    """Cancel the flow's task in the middle of a step, two steps after where it continues."""
    last = committed(asked) + 2
    before = descendants(os.getpid())
    trainer: set[int] = set()

    def listen(progress: Progress) -> None:
        if progress.step == last:
            trainer.update(descendants(os.getpid()) - before)
            task.cancel()

    caplog.clear()
    task = asyncio.create_task(train_with_trl(asked, on_progress=listen))
    with pytest.raises(asyncio.CancelledError):
        await task
    # Nobody is there any more when the cancelled call returns, and none had to be killed.
    assert len(trainer) >= 1
    assert descendants(os.getpid()) == before
    assert "is killed" not in caplog.text
    assert last <= committed(asked) < STEPS


async def die(asked: TrainingRequest, moment: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the trainer killed at the commit of a step; the error must say so."""
    heard: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            launch,
            "launch_command",
            lambda _, path, __: [sys.executable, str(HERE / "trl_process_and_die.py"), moment, str(at), str(path)],
        )
        with pytest.raises(RunStopped, match=r"(?s)TRL's trainer was killed by SIGKILL; the same command .*") as death:
            await train_with_trl(asked, on_progress=lambda progress: heard.append(progress.step))
    assert f"The end of {asked.run_dir / launch.LOG}:" in str(death.value)
    assert f"tasks.engines.ledger: Step {at - 1} of {STEPS}" in str(death.value)
    # A step that counts is told even where the trainer died right after it.
    assert committed(asked) == heard[-1] == (at if moment == "committed" else at - 1)


@pytest.mark.slow
async def test_a_run_that_was_ended_in_every_way_ends_like_a_straight_one(
    tmp_path: Path,
    reward_server_url: str,
    python_path: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    straight, ended = (request(tmp_path / kind / "run", reward_server_url, **ASKED) for kind in ("straight", "ended"))
    uninterrupted = asyncio.create_task(train_with_trl(straight))
    await kill_the_flow(ended, reward_server_url)
    await uninterrupted
    await cancel(ended, caplog)
    now = committed(ended)
    await die(ended, "row", now + 2, monkeypatch)
    await die(ended, "committed", now + 3, monkeypatch)
    result = await train_with_trl(ended)

    assert result.steps == STEPS
    assert_same_runs(straight.run_dir, ended.run_dir, "trl", STEPS)
    assert_mlflow_has_each_metric_once(ended.run_dir, "trl")
    for step in range(1, STEPS + 1):
        one, other = (titles_of(asked.run_dir, "rollouts", step) for asked in (straight, ended))
        # The titles of a group in the order of TRL's batch, with the stories that they are of.
        assert [[row["story_id"], row["title"]] for row in one] == [[row["story_id"], row["title"]] for row in other]
        assert [row["reward"] for row in one] == pytest.approx([row["reward"] for row in other], abs=METRIC_TOLERANCE)
