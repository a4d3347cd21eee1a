"""Reward model trainings that were killed, stopped or finished, and the command that is given again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reward_training_parts import FinishedTraining, history, reward_run, train
from safetensors.torch import load_file

from tasks.reward_training.runs import model_folder
from tasks.titles.errors import CheckpointError, RunStopped
from tasks.titles.run_directory import RunDirectory

PARTS = Path(__file__).parent


def copy_of(run: RunDirectory, folder: Path) -> RunDirectory:
    """Copy a run with its stories and its MLflow into `folder`."""
    home = run.path.parent.parent
    shutil.copytree(home, folder, dirs_exist_ok=True)
    return replace(run, path=folder / run.path.relative_to(home))


def sit_until_death(folder: Path, *death: str) -> None:
    """Train in a process of its own, which is killed where `death` says so."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PARTS), str(PARTS.parents[1])])}
    done = subprocess.run(
        [sys.executable, str(PARTS / "reward_train_and_die.py"), str(folder), *death],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("death", [("logged", "5"), ("written", "4")])
def test_a_killed_training_continues_as_if_nothing_had_happened(
    death: tuple[str, str], reward_training: FinishedTraining, tmp_path: Path
) -> None:
    whole = reward_training.run
    sit_until_death(tmp_path, *death)
    run = reward_run(tmp_path)
    first = run.record().mlflow_run_id
    before = history(run)["train/loss"]
    assert max(before) == int(death[1]) and not model_folder(run).exists()
    train(run)
    assert run.record().mlflow_run_id == first
    expected = history(whole)
    assert set(history(run)) == set(expected)
    for name, series in history(run).items():
        assert series == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    weights, others = (load_file(model_folder(one) / "adapter" / "adapter_model.safetensors") for one in (run, whole))
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights | others)


def test_a_finished_training_takes_no_further_step(reward_training: FinishedTraining, tmp_path: Path) -> None:
    run = copy_of(reward_training.run, tmp_path)
    before = history(run)
    shutil.rmtree(model_folder(run))  # as if killed between the last checkpoint and the model
    told: list[tuple[str, int]] = []
    trained = train(run, lambda stage, done, total, note="": told.append((stage, done)))
    assert [done for stage, done in told if stage == "training"] == [reward_training.steps]
    assert history(run) == before
    assert trained.figures["test"].rmse == pytest.approx(before["test/rmse"][reward_training.steps], abs=1e-5)


def test_other_stories_are_no_continuation(reward_training: FinishedTraining, tmp_path: Path) -> None:
    run = copy_of(reward_training.run, tmp_path)
    rows = [json.loads(line) for line in Path(run.profile.stories).read_text().splitlines()]
    rows[0]["score"] += 100
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = replace(run, profile=run.profile.model_copy(update={"stories": str(tmp_path / "other.jsonl")}))
    with pytest.raises(CheckpointError, match="trained on other stories"):
        train(changed)


def test_it_stops_where_asked_to_and_continues(tmp_path: Path) -> None:
    run, stop = reward_run(tmp_path), threading.Event()

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if (stage, done) == ("training", 3):
            stop.set()

    with pytest.raises(RunStopped, match="continues from the last checkpoint"):
        train(run, on_progress, stop)
    assert max(history(run)["train/loss"]) == 3
    assert train(run).steps == 7
