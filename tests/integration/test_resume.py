"""Kill a training without warning, run the same command, and end where an uninterrupted one ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from train_and_die import sit
from training_parts import request

from tasks.engines.art_resume import checkpoints_folder, journal_of, stored_state

STEPS = 10
HERE = Path(__file__).parent
# Sampling and training are seeded per title and per step, so both runs do the same arithmetic. What may differ
# is which requests the servers happen to compute in one batch, and with it the order of float32 sums: some 1e-6
# per log-probability and score. Ten steps carry that on into the metrics; Adam divides a gradient by its own
# size and so makes more of it in single weights.
METRIC_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-3


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


def without_times(rows: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    clocks = ("time/", "throughput/", "canary/")
    return {step: {n: v for n, v in row.items() if not n.startswith(clocks)} for step, row in rows.items()}


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
        state = stored_state(killed)
        assert state is not None
        assert state.cursor.step == survives, moment
    assert (checkpoints_folder(killed) / "0008" / "cursor.json").exists()
    assert await sitting(killed, reward_server_url) == 0

    assert seen(killed) == seen(straight)
    assert sorted(seen(straight)) == list(range(1, STEPS + 1))
    rows, others = journal_of(straight).rows(), journal_of(killed).rows()
    assert sorted(rows) == sorted(others) == list(range(STEPS + 1))
    for step, row in without_times(rows).items():
        assert without_times(others)[step] == pytest.approx(row, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE), (
            f"step {step}"
        )
    assert cursor(straight) == cursor(killed)
    assert_same_weights(straight, killed)
    assert_mlflow_has_each_metric_once(killed, reward_server_url)


def cursor(run_dir: Path) -> Any:
    state = stored_state(run_dir)
    assert state is not None
    return state.cursor, state.best_step, state.trajectories_dropped


def assert_same_weights(one: Path, other: Path) -> None:
    from safetensors.torch import load_file

    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        left, right = (load_file(checkpoints_folder(run) / f"{STEPS:04d}" / name) for run in (one, other))
        assert left.keys() == right.keys()
        for key, values in left.items():
            difference = (values.float() - right[key].float()).abs().max().item()
            assert difference < WEIGHT_TOLERANCE, key


def assert_mlflow_has_each_metric_once(run_dir: Path, url: str) -> None:
    from mlflow import MlflowClient

    state = stored_state(run_dir)
    assert state is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.run_id for run in runs] == [state.mlflow_run_id]
    assert runs[0].info.status == "FINISHED"
    rows = journal_of(run_dir).rows()
    for name in {name for row in rows.values() for name in row}:
        wanted = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        stored = [(entry.step, entry.value) for entry in client.get_metric_history(state.mlflow_run_id, name)]
        assert sorted(stored) == wanted, name


async def test_a_kill_among_the_rollouts_of_the_first_step(tmp_path: Path, reward_server_url: str) -> None:
    run_dir = tmp_path / "killed" / "run"
    run_dir.mkdir(parents=True)
    assert await sitting(run_dir, reward_server_url, "rollouts", 1) == -signal.SIGKILL
    assert sorted(journal_of(run_dir).rows()) == [0]
    asked = request(run_dir, reward_server_url, max_steps=1, eval_steps=3)
    await sit(asked)
    assert sorted(journal_of(run_dir).rows()) == [0, 1]
    assert_mlflow_has_each_metric_once(run_dir, reward_server_url)
