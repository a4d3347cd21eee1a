"""A command that is interrupted or killed leaves no process behind, and goes on when it is given again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from processes import MARK, processes_of, wait_until_none_is_left

from tasks.starter.world import generate_stories
from tasks.titles.config import PROFILES_DIR

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STORIES = 240
SETTINGS = (
    "stories=stories.jsonl",
    "minimum_score=0",
    "test_stories=4",
    "max_steps=3",
    "eval_steps=3",
    "groups_per_step=2",
    "train_stories=20",
    "val_stories=2",
    "max_completion_tokens=16",
)
COMMAND = ["train", "--profile", "starter.toml", *(part for setting in SETTINGS for part in ("--set", setting))]
ENGINES = [("art", signal.SIGINT), ("trl", signal.SIGTERM)]


def start(folder: Path, engine: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: str(folder)}
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "REWARD_MODEL_URL", "RUNS_DIR"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *COMMAND, "--engine", engine],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    pytest.fail(f"'{text}' never came:\n{''.join(seen)}")


@pytest.mark.parametrize(("engine", "interruption"), ENGINES)
def test_interrupted_then_killed_then_finished_in_one_run(
    tmp_path: Path, engine: str, interruption: signal.Signals
) -> None:
    run = f"starter-{engine}-1"

    def record() -> dict[str, Any]:
        return json.loads((tmp_path / "runs" / run / "run.json").read_text())

    shutil.copy(PROFILES_DIR / "starter.toml", tmp_path)
    stories = [json.dumps(asdict(story), default=str) for story in generate_stories(STORIES)]
    (tmp_path / "stories.jsonl").write_text("\n".join(stories), encoding="utf-8")
    first = start(tmp_path, engine)
    read_until(first, "training steps: 1/3")
    assert len(processes_of(tmp_path)) >= 3, "Prefect's server and the reward server run beside the command"
    first.send_signal(interruption)
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 130, told
    assert f"Run {run} continues with the same command." in told and "Traceback" not in told
    wait_until_none_is_left(tmp_path)
    run_id = record()["mlflow_run_id"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "KILLED"

    second = start(tmp_path, engine)
    read_until(second, f"Continuing run {run}")
    read_until(second, "training steps: 2/3")
    second.kill()
    second.communicate(timeout=60)
    # Nobody was left to stop the servers: they notice by themselves.
    wait_until_none_is_left(tmp_path)

    third = start(tmp_path, engine)
    told, _ = third.communicate(timeout=300)
    assert third.returncode == 0, told
    assert told.splitlines()[-1] == f"runs/{run}"
    assert (record()["state"], record()["mlflow_run_id"]) == ("trained", run_id)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [row.step for row in client.get_metric_history(run_id, "train/reward")] == [1, 2, 3]
    wait_until_none_is_left(tmp_path)
