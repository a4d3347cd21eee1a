"""Training with TRL in its own process, beside the real reward server and MLflow, a few steps on a few stories."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from processes import descendants
from resume_parts import assert_mlflow_has_each_metric_once, weights
from serving import serving_scorer, starter_scorer
from training_parts import profile, request, titles_of, tracking_uri, train_with_trl

from reward_server.scorer import Scorer
from tasks.engines.contract import Progress, TrainingRequest, TrainingResult
from tasks.engines.resume import adapter_folder, checkpoints_folder, journal_of, stored_state
from tasks.engines.tracker import MlflowTracker
from tasks.engines.trl_engine import launch
from tasks.titles import metric_names as names
from tasks.titles.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NothingToTrainOn,
    RunStopped,
    TooManyFailures,
)
from tasks.titles.group_statistics import JUDGE_NOISE

DEAD_SERVER = "http://127.0.0.1:9"
VALIDATION = 6
"""Validation stories."""


@dataclass
class Trained:
    """A finished training of three steps."""

    asked: TrainingRequest
    result: TrainingResult
    heard: list[Progress]

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        return journal_of(self.asked.run_dir).rows()


def trl_request(run_dir: Path, url: str, **changes: Any) -> TrainingRequest:
    return request(run_dir, url, engine="trl", **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, reward_server_url: str) -> Trained:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    rate = 5e-2  # it ruins the policy within these steps
    asked = trl_request(run_dir, reward_server_url, val_stories=VALIDATION, learning_rate={"art": rate, "trl": rate})
    heard: list[Progress] = []
    before = descendants(os.getpid())
    result = asyncio.run(train_with_trl(asked, on_progress=heard.append))
    assert descendants(os.getpid()) == before
    return Trained(asked, result, heard)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    """An MLflow run for trainings that come to nothing."""
    return MlflowTracker.open(
        profile(), run_name="nothing", tracking_uri=tracking_uri(tmp_path_factory.mktemp("nothing"))
    )


def test_three_steps(trained: Trained) -> None:
    result, rows = trained.result, trained.rows
    assert (result.engine, result.steps) == ("trl", 3)
    # The newest two, the best and the untrained one are kept.
    assert set(result.checkpoints) == {0, 2, 3, result.best_step}
    for folder in result.checkpoints.values():
        assert {"adapter_model.safetensors", "adapter_config.json", "cursor.json"} <= {p.name for p in folder.iterdir()}
    assert sorted(rows) == [0, 1, 2, 3]
    # Validated before the first step, every eval_steps = 2 steps and after the last.
    assert [step for step in rows if names.VAL_REWARD_MEAN in rows[step]] == [0, 2, 3]
    rewards = {step: rows[step][names.VAL_REWARD_MEAN] for step in (0, 2, 3)}
    assert max(rewards.values()) <= rewards[result.best_step] + JUDGE_NOISE
    assert result.best_step != 3, "a ruined policy is not the best"
    for step in (1, 2, 3):
        groups = [
            rows[step][f"train/groups_{kind}"] for kind in ("submitted", "trainable", "without_spread", "dropped")
        ]
        assert groups[0] == sum(groups[1:]) == 2
        assert 0 <= rows[step][names.CANARY_MEAN_DIFFERENCE] <= rows[step][names.CANARY_MAX_DIFFERENCE] < 1e-3
        assert 0 <= rows[step][names.VERDICT_NEITHER] < 0.1
        times = [rows[step][name] for name in (names.TIME_ROLLOUT, names.TIME_TRAIN, names.TIME_STEP)]
        assert min(times) > 0 and sum(times[:2]) <= times[2]


def test_progress_is_heard_in_order(trained: Trained) -> None:
    assert [progress.step for progress in trained.heard] == [0, 1, 2, 3]
    assert [progress.metrics for progress in trained.heard] == list(trained.rows.values())
    titles = [progress.validation_titles for progress in trained.heard]
    assert [len(rows) for rows in titles] == [VALIDATION, 0, VALIDATION, VALIDATION]
    assert list(titles[3]) == titles_of(trained.asked.run_dir, "validation", 3)


def test_mlflow_holds_metrics_titles_and_checkpoints(trained: Trained) -> None:
    run_dir = trained.asked.run_dir
    assert_mlflow_has_each_metric_once(run_dir, "trl")
    client = MlflowClient(tracking_uri=tracking_uri(run_dir))
    run = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])[0]
    tables = {"validation": {0, 2, 3}, "rollouts": {2, 3}}
    stored = {entry.path for entry in client.list_artifacts(run.info.run_id, "titles")}
    assert stored == {f"titles/{kind}-{step:04d}.json" for kind, steps in tables.items() for step in steps}
    for path in stored:
        kind, step = Path(path).stem.split("-")
        table = json.loads(Path(client.download_artifacts(run.info.run_id, path)).read_text())
        titles = [row[table["columns"].index("title")] for row in table["data"]]
        assert titles == [row["title"] for row in titles_of(run_dir, kind, int(step))]
    models = client.search_logged_models([run.info.experiment_id])
    assert {model.name: str(model.status) for model in models} == {
        f"run-step-{step:04d}": "READY" for step in (0, 2, 3)
    }


def test_training_changes_the_weights_and_the_titles(trained: Trained) -> None:
    run_dir = trained.asked.run_dir
    at = {step: weights(adapter_folder(run_dir, "trl", step)) for step in (0, 2, 3)}
    assert all(at[0][name].abs().max() == 0 for name in at[0] if "lora_B" in name)
    for before, after in ((0, 2), (2, 3)):
        assert all((at[before][name] != at[after][name]).any() for name in at[before])
    titles = {step: [row["title"] for row in titles_of(run_dir, "validation", step)] for step in (0, 3)}
    # The seeds are the same, so it is the adapter that makes the difference.
    assert sum(one != other for one, other in zip(titles[0], titles[3], strict=True)) > VALIDATION / 2


def test_a_complete_training_returns_its_result_from_disk(trained: Trained) -> None:
    paths = [trained.asked.run_dir / launch.LOG, *checkpoints_folder(trained.asked.run_dir, "trl").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in paths}
    rows = trained.rows
    heard: list[Progress] = []
    again = asyncio.run(train_with_trl(trained.asked, on_progress=heard.append))
    assert (again, heard) == (trained.result, [])
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    assert trained.rows == rows
    assert_mlflow_has_each_metric_once(trained.asked.run_dir, "trl")


async def test_another_mlflow_run_is_refused(trained: Trained, tracker: MlflowTracker) -> None:
    with pytest.raises(CheckpointError, match=tracker.run_id):
        await launch.train(trained.asked, tracker=tracker)


async def test_a_reward_server_that_dies_stops_the_run_with_the_reason(trained: Trained) -> None:
    longer = trained.asked.profile.model_copy(update={"max_steps": 5, "max_failed_share": 0.5})
    asked = replace(trained.asked, profile=longer, reward_model_url=DEAD_SERVER)
    rows = trained.rows
    with pytest.raises(TooManyFailures, match="reward model: ServiceUnavailable"):
        await train_with_trl(asked)
    state = stored_state(asked.run_dir, "trl")
    assert state is not None and state.cursor.step == 3
    assert trained.rows == rows


class Indifferent(Scorer):
    """A reward model that finds every title worthless."""

    def __init__(self) -> None:
        self.__dict__.update(starter_scorer().__dict__)

    def score_tokens(self, batch: Sequence[Sequence[int]]) -> list[float]:
        return [0.0] * len(batch)


async def test_nothing_to_train_on_stops_the_run_with_the_reason(tmp_path: Path, tracker: MlflowTracker) -> None:
    async with serving_scorer(Indifferent()) as (url, _):
        asked = trl_request(tmp_path / "run", url, max_empty_batches=2, group_size=2, val_stories=1)
        with pytest.raises(NothingToTrainOn, match="2 batches in a row had nothing to train on: of 4 groups"):
            await launch.train(asked, tracker=tracker)
    # Unlike ART's loop, TRL makes its update with what it has, here nothing, and the step counts.
    rows = journal_of(asked.run_dir).rows()
    assert sorted(rows) == [0, 1]
    assert rows[1][names.TRAIN_EMPTY_BATCHES] == 1
    assert rows[1][names.TRAIN_GRAD_NORM] == 0


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("", r"ended without an error at step None of 3. Look at .*trainer\.log"),
        ("raise SystemExit('no more memory')", r"(?s)ended with exit code 1; .*trainer\.log:\nno more memory$"),
        ("import os; print('so far', flush=True); os.abort()", r"(?s)was killed by SIGABRT; .*\nso far"),
    ],
)
async def test_a_process_that_ends_early_is_told_with_its_log(
    code: str, told: str, tmp_path: Path, tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "launch_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(RunStopped, match=told):
        await launch.train(trl_request(tmp_path / "run", DEAD_SERVER), tracker=tracker)


@pytest.mark.parametrize(
    ("settings", "changes", "error", "told"),
    [
        ({"trl": {"micro_batch": 4}}, {}, ConfigError, "no multiple of trl.micro_batch = 4"),
        ({}, {"val": []}, DataError, "0 to validate"),
        ({}, {"train": []}, DataError, "0 for training"),
    ],
)
async def test_what_cannot_be_trained_is_refused_before_anything_is_started(
    settings: dict[str, Any],
    changes: dict[str, Any],
    error: type[Exception],
    told: str,
    tmp_path: Path,
    tracker: MlflowTracker,
) -> None:
    asked = replace(trl_request(tmp_path / "run", DEAD_SERVER, **settings), **changes)
    with pytest.raises(error, match=told):
        await launch.train(asked, tracker=tracker)
    assert not asked.run_dir.exists()
