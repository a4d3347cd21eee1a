"""The flows in Prefect's own harness: a few steps on a few stories with real models, servers and MLflow."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from flows.compare import compare_engines
from flows.evaluate import evaluate_run
from flows.progress import watched_by
from flows.run import run_titles
from flows.train import train_titles
from reward_server.process import RewardServerProcess
from tasks.engines.checkpoints import complete_steps
from tasks.engines.resume import checkpoints_folder
from tasks.health import check_health
from tasks.starter.world import generate_stories
from tasks.titles.comparison import Comparison
from tasks.titles.errors import ConfigError, ServiceRejected, ServiceUnavailable
from tasks.titles.evaluation import MEASURES
from tasks.titles.summary import Evaluation

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]

SMALL = (
    "stories=stories.jsonl",
    "minimum_score=0",
    "max_steps=3",
    "eval_steps=2",
    "groups_per_step=3",
    "group_size=4",
    "val_stories=4",
    "test_stories=4",
    "max_completion_tokens=24",
    "bootstrap_samples=200",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small file of stories, some of them unusable."""
    folder = tmp_path_factory.mktemp("workplace")
    rows = [asdict(story) for story in generate_stories(240)]
    rows[0]["scraped_body"] = ""
    rows[1]["id"] = rows[2]["id"]
    lines = [json.dumps(row, default=lambda value: value.isoformat()) for row in rows]
    (folder / "stories.jsonl").write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for name in ("MLFLOW_TRACKING_URI", "REWARD_MODEL_URL", "HELDOUT_REWARD_MODEL_URL", "RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)


def children() -> set[str]:
    """Return this process's direct child processes."""
    return {
        pid for task in Path(f"/proc/{os.getpid()}/task").iterdir() for pid in (task / "children").read_text().split()
    }


@pytest.fixture(scope="module")
def finished(workplace: Path, prefect_harness: None) -> tuple[Evaluation, list[str], set[str]]:
    """One whole run, what it told its watcher, and the processes that it left."""
    told: list[str] = []

    def watcher(stage: str, done: float, total: float | None, note: str) -> None:
        if done == total:
            told.append(stage)

    before = children()
    home = os.getcwd()
    os.chdir(workplace)
    try:
        with watched_by(watcher):
            evaluation = asyncio.run(run_titles("starter", list(SMALL), "whole"))
    finally:
        os.chdir(home)
    return evaluation, told, children() - before


def read_summary(run_name: str) -> dict[str, Any]:
    return json.loads((Path("runs") / run_name / "summary.json").read_text(encoding="utf-8"))


def rows_of(client: MlflowClient, run_id: str) -> Counter[tuple[str, int]]:
    names = client.get_run(run_id).data.metrics
    return Counter((name, row.step) for name in names for row in client.get_metric_history(run_id, name))


async def artifacts(run_name: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read the artifacts of the flow runs of ``run_name``; other tests leave theirs under the same keys."""
    async with get_client() as client:
        of_run = FlowRunFilter(name=FlowRunFilterName(like_=run_name))
        found = await client.read_artifacts(limit=200, flow_run_filter=of_run)
    return {artifact.key: artifact for artifact in found if artifact.key in keys}


def test_a_run_ends_with_a_summary_of_finite_figures(finished: tuple[Evaluation, list[str], set[str]]) -> None:
    summary = read_summary("whole")
    assert (summary["engine"], summary["profile"], summary["steps"]) == ("art", "starter", 3)
    assert summary["best_step"] in {0, 2, 3} and summary["seconds"] > 0
    for writer in ("base", "best", "human"):
        for measure in MEASURES:
            interval = summary[writer][measure]
            assert interval["low"] <= interval["mean"] <= interval["high"], (writer, measure)
            assert all(math.isfinite(value) for value in interval.values())
    gain = summary["best"]["reward_gain"]
    assert gain["mean"] == pytest.approx(summary["best"]["reward"]["mean"] - summary["base"]["reward"]["mean"])
    assert summary["reward_model"].keys() == {"rmse", "rmse_baseline", "pearson", "spearman"}
    assert summary["failed_judgements"] == 0 and summary["test_stories"] == 4
    assert summary == json.loads(json.dumps(finished[0].summary()))


def test_training_moved_the_policy_and_kept_its_checkpoints(finished: tuple[Evaluation, list[str], set[str]]) -> None:
    run_dir = Path("runs/whole")
    assert complete_steps(checkpoints_folder(run_dir, "art")) == [0, 1, 2, 3]
    journal = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in journal] == [0, 1, 2, 3]
    assert all(row["metrics"]["train/reward"] > 0 for row in journal[1:])
    assert all(row["metrics"]["train/grad_norm"] > 0 for row in journal[1:])
    assert json.loads((run_dir / "run.json").read_text())["state"] == "evaluated"


def test_everything_is_in_mlflow_once(finished: tuple[Evaluation, list[str], set[str]]) -> None:
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    run_id = read_summary("whole")["mlflow_run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["group_size"] == "4"
    note = run.data.tags["mlflow.note.content"]
    assert "ART trains a policy: 3 steps" in note and str(Path("runs/whole").resolve()) in note
    assert "Reward of the best checkpoint minus the base model's" in note and "| base model | sampled |" in note
    rows = rows_of(client, run_id)
    assert set(rows.values()) == {1}
    assert {("train/reward", step) for step in (1, 2, 3)} <= rows.keys()
    assert {("val/reward/mean", step) for step in (0, 2, 3)} <= rows.keys()
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    assert {model.params["step"] for model in models} >= {"0", "2", "3"}
    best = next(model for model in models if model.params["step"] == str(read_summary("whole")["best_step"]))
    assert "test/reward/mean" in {metric.key for metric in best.metrics}
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"profile.json", "reward_curve.png", "summary.json", "report.md", "titles"} <= names
    tables = {file.path for file in client.list_artifacts(run_id, "titles")}
    assert {"titles/test.json", "titles/validation-0000.json", "titles/validation-0003.json"} <= tables


async def test_prefect_shows_groups_progress_report_and_titles(
    finished: tuple[Evaluation, list[str], set[str]],
) -> None:
    async with get_client() as client:
        names = {run.name for run in await client.read_task_runs(limit=200)}
        flow_runs = {run.name: run.state_name for run in await client.read_flow_runs(limit=200)}
    assert sum(name.startswith("group-") for name in names) >= 3 * 3
    assert {"run-whole", "train-whole", "evaluate-whole"} <= flow_runs.keys()
    assert flow_runs["run-whole"] == "Completed"
    found = await artifacts("whole", ("training", "report", "results", "test-titles", "validation-titles", "stories"))
    assert len(found) == 6
    assert found["training"].data == 100.0
    assert read_summary("whole")["mlflow_run_id"] in found["report"].data and "mlflow ui" in found["report"].data
    assert len(json.loads(found["results"].data)) >= 5
    assert "duplicate" in found["stories"].data


def test_every_stage_was_told_to_its_end_and_no_process_is_left(
    finished: tuple[Evaluation, list[str], set[str]],
) -> None:
    _, told, left = finished
    assert {"stories", "reward server", "training", "judges", "evaluation"} <= set(told)
    assert left == set()


async def test_a_finished_run_is_trained_no_further_and_can_be_evaluated_otherwise(
    finished: tuple[Evaluation, list[str], set[str]], reward_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODEL_URL", reward_server_url)
    journal = Path("runs/whole/metrics.jsonl").read_bytes()
    run_id = read_summary("whole")["mlflow_run_id"]
    assert await train_titles("starter", list(SMALL), "whole") == "whole"
    assert Path("runs/whole/metrics.jsonl").read_bytes() == journal
    evaluation = await evaluate_run("whole", None, ["heldout_reward_model=null", "test_stories=2"])
    summary = read_summary("whole")
    assert summary["test_stories"] == 2 and summary["base"]["heldout_score"] is None
    assert evaluation.training.mlflow_run_id == run_id
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    assert set(rows_of(client, run_id).values()) == {1}


@pytest.fixture(scope="module")
def compared(workplace: Path, finished: tuple[Evaluation, list[str], set[str]]) -> Comparison:
    """A comparison with one seed."""
    home = os.getcwd()
    os.chdir(workplace)
    try:
        return asyncio.run(compare_engines("starter", [*SMALL, "max_steps=2"], [2], run_name="both"))
    finally:
        os.chdir(home)


def test_a_comparison_trains_both_engines_and_reports_with_one_ruler(compared: Comparison) -> None:
    home = Path("runs/comparisons/both")
    figures = json.loads((home / "report.json").read_text(encoding="utf-8"))
    assert [(run["engine"], run["seed"], run["steps"]) for run in figures["runs"]] == [
        ("art", 2, 2),
        ("trl", 2, 2),
    ]
    assert all(run["trajectories"] > 0 and run["peak_memory_mb"] > 100 for run in figures["runs"])
    assert [method["id"] for method in figures["methods"]] == [
        *("base", "best_of_6", "human", "first_sentence", "art_best", "art_last", "trl_best", "trl_last")
    ]
    # The untrained policies of both engines are one: their validation titles earn the same at step 0.
    start = {(run["engine"], run["seed"]): run["curve"][0]["val_reward"] for run in figures["runs"]}
    assert start["art", 2] == pytest.approx(start["trl", 2], abs=1e-3)
    page = (home / "report.html").read_text(encoding="utf-8")
    assert all(sentence.split("'")[0] in page for sentence in figures["conclusions"])
    assert "--seeds 2" in figures["command"]


def test_a_comparison_is_in_mlflow_and_in_prefect(compared: Comparison) -> None:
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    run_id = json.loads(Path("runs/comparisons/both/run.json").read_text())["mlflow_run_id"]
    assert {"report.html", "report.json"} <= {file.path for file in client.list_artifacts(run_id)}
    run = client.get_run(run_id)
    assert "test/trl_best/reward/mean" in run.data.metrics and run.data.tags["kind"] == "comparison"
    link = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts/report.html?"
    trained = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert {(child.data.tags["engine"], child.data.params["seed"]) for child in trained} == {("art", "2"), ("trl", "2")}
    # Both engines' curves lie over each other: the same names over the same steps.
    art, trl = (
        {row for row in rows_of(client, child.info.run_id) if row[0].startswith(("train/", "val/"))}
        for child in trained
    )
    assert art == trl and ("val/reward/mean", 2) in art
    assert all(link in one.data.tags["mlflow.note.content"] for one in (run, *trained))
    found = asyncio.run(artifacts("compare-both", ("comparison", "comparison-results")))
    assert "report.html" in found["comparison"].data and run_id in found["comparison"].data


async def test_trained_runs_are_compared_again_without_training(
    compared: Comparison, reward_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODEL_URL", reward_server_url)
    names = [run.run_name for run in compared.runs]
    journals = {name: Path("runs", name, "metrics.jsonl").read_bytes() for name in names}
    again = await compare_engines(runs=names, run_name="again")
    assert {name: Path("runs", name, "metrics.jsonl").read_bytes() for name in names} == journals
    assert [title.title for title in again.titles] == [title.title for title in compared.titles]
    with pytest.raises(ConfigError, match="same seeds"):
        await compare_engines(runs=names[:1], run_name="alone")


async def test_a_reward_server_that_is_not_there_ends_the_run_before_training(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODEL_URL", "http://127.0.0.1:9")
    # As many tries as ever, with shorter pauses.
    monkeypatch.setattr("reward_server.client._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(check_health, "retry_delay_seconds", 0.01)
    before = children()
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9"):
        await train_titles("starter", [*SMALL, "seed=5"], "no-judge")
    assert complete_steps(checkpoints_folder(Path("runs/no-judge"), "art")) == []
    client = MlflowClient(f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    run_id = json.loads(Path("runs/no-judge/run.json").read_text())["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "FAILED"
    assert children() <= before


async def test_a_judge_that_refuses_ends_the_evaluation_and_leaves_the_last_one_as_it_is(
    finished: tuple[Evaluation, list[str], set[str]], reward_server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = Path("runs/whole/summary.json").read_bytes()
    monkeypatch.setenv("REWARD_MODEL_URL", reward_server_url)
    with RewardServerProcess("starter", log_path=Path("keyed.log"), threads=1, api_key="secret") as keyed:
        monkeypatch.setenv("HELDOUT_REWARD_MODEL_URL", keyed.url)
        with pytest.raises(ServiceRejected, match="401"):
            await evaluate_run("whole")
    assert Path("runs/whole/summary.json").read_bytes() == summary
