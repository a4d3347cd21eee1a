"""The flow in Prefect's own harness, and the command line: train, register, report, serve what was registered."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from reward_training_parts import overrides, write_stories

from flows.progress import watched_by
from flows.train_reward_model import train_reward_model
from reward_server.client import RewardClient, RewardInput
from reward_server.process import RewardServerProcess
from tasks.reward_training.report import RewardModelReport
from tasks.starter.reward_labels import label
from tasks.titles.errors import DataError
from tasks.titles.sources import load_stories

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    write_stories(folder / "stories.jsonl")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for name in ("MLFLOW_TRACKING_URI", "REWARD_MODEL_URL", "RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def finished(workplace: Path, prefect_harness: None) -> tuple[RewardModelReport, dict[str, tuple[float, Any]]]:
    """One whole run, and the last thing that each stage told its watcher."""
    told: dict[str, tuple[float, Any]] = {}

    def watcher(stage: str, done: float, total: float | None, note: str) -> None:
        told[stage] = (done, total)

    before = Path.cwd()
    os.chdir(workplace)
    try:
        with watched_by(watcher):
            return asyncio.run(train_reward_model("starter", overrides(Path("stories.jsonl")))), told
    finally:
        os.chdir(before)


async def test_every_stage_has_a_bar_that_fills(finished: Any) -> None:
    _, told = finished
    assert set(told) == {"stories", "tokens", "training", "figures"}
    assert all(done == total for done, total in told.values())


async def test_figures_are_in_the_folder_in_mlflow_and_in_prefect(finished: Any, workplace: Path) -> None:
    report, _ = finished
    folder = workplace / "runs" / "reward-models" / report.run_name
    assert report.run_name == "starter-reward-model-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(report.as_dict()))
    assert summary["registered"] == "models:/tests-reward-model/1" and set(summary["figures"]) == {
        "train",
        "val",
        "test",
    }
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "trained" and record["peak_memory_mb"] > 100
    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    run = client.get_run(record["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/rmse"] == pytest.approx(summary["figures"]["test"]["rmse"])
    assert run.data.params["reward_training.lora_alpha"] == "16"
    assert {"calibration.png", "summary.json", "reward-model"} <= {
        entry.path for entry in client.list_artifacts(run.info.run_id)
    }
    async with get_client() as prefect:
        [artifact] = await prefect.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["reward-model"]))
        )
    assert summary["registered"] in artifact.data and "| test | 5 |" in artifact.data


async def test_the_reward_server_serves_what_was_registered(finished: Any, workplace: Path) -> None:
    report, _ = finished
    test = [story for story in load_stories("stories.jsonl").stories if story.split == "test"]
    with RewardServerProcess(
        "models:/tests-reward-model@newest", log_path=workplace / "reward-server.log", threads=1
    ) as server:
        async with RewardClient(server.url) as client:
            scores = await client.score_batch([RewardInput.from_story(story, story.title) for story in test])
    found = sum((score.score - label(story.score)) ** 2 for score, story in zip(scores, test, strict=True)) / len(test)
    assert found**0.5 == pytest.approx(report.trained.figures["test"].rmse, abs=1e-3)


async def test_data_without_spread_end_the_run_at_its_start(workplace: Path) -> None:
    rows = [json.loads(line) for line in (workplace / "stories.jsonl").read_text().splitlines()]
    (workplace / "flat.jsonl").write_text("".join(json.dumps({**row, "score": 5}) + "\n" for row in rows))
    with pytest.raises(DataError, match="same label"):
        await train_reward_model("starter", overrides(Path("flat.jsonl")), "flat")
    record = json.loads((workplace / "runs" / "reward-models" / "flat" / "run.json").read_text())
    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    assert client.get_run(record["mlflow_run_id"]).info.status == "FAILED"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_command_at_once(signal_number: signal.Signals, workplace: Path) -> None:
    name = f"interrupted-{signal_number}"
    settings = overrides(Path("stories.jsonl"), epochs=2000, max_steps=5000, eval_steps=5000)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "train-reward-model", "-n", name, *(f"-s{value}" for value in settings)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    with process:
        for line in process.stderr:
            if line.startswith("training steps: 0/5000"):
                break
        checkpoints = workplace / "runs" / "reward-models" / name / "checkpoints"
        for _ in range(600):
            if list(checkpoints.glob("*/complete.json")):
                break
            time.sleep(0.1)
        process.send_signal(signal_number)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert f"Interrupted. Run {name} continues with the same command." in rest
    record = json.loads((checkpoints.parent / "run.json").read_text())
    client = MlflowClient(f"sqlite:///{workplace}/runs/mlflow.db")
    assert record["state"] == "training" and client.get_run(record["mlflow_run_id"]).info.status == "KILLED"


def test_the_command_line_shows_figures_and_how_to_use_the_model(workplace: Path) -> None:
    settings = [part for value in overrides(Path("stories.jsonl"), max_steps=2) for part in ("--set", value)]
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "train-reward-model", "--run-name", "cli", *settings],
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RMSE of the mean" in done.stdout and "run --set reward_model=models:/tests-reward-model/" in done.stdout
    assert "training steps: 2/2" in done.stderr and "passes for figures" in done.stderr
    assert "Traceback" not in done.stderr
