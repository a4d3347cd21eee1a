"""The tracker against a real MLflow store in SQLite."""

from __future__ import annotations

import logging
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.engines.system_metrics import system_metrics
from tasks.engines.tracker import EXPERIMENT, MlflowTracker
from tasks.titles.config import default_tracking_uri, load_profile
from tasks.titles.errors import ServiceUnavailable
from tasks.titles.run_note import Kind

PROFILE = load_profile("starter")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_tracking_uri(tmp_path_factory.mktemp("runs"))


def adapter(folder: Path, text: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(text)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"for resuming only")
    return folder


def rows(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(row.step, row.value) for row in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_run_holds_the_whole_profile_and_its_metrics(uri: str) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="first", tracking_uri=uri)
    tracker.log_metrics(1, {"train/reward": 2.0, "train/loss": 0.1})
    tracker.log_metrics(2, {"train/reward": 2.5})
    tracker.finish("FINISHED")
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert run.data.params["learning_rate.art"] == str(PROFILE.learning_rate.art)
    tables = {key: value for key, value in PROFILE.model_dump().items() if isinstance(value, dict)}
    expected = {f"{key}.{part}" for key, table in tables.items() for part in table}
    assert set(run.data.params) == expected | (PROFILE.model_dump().keys() - tables.keys())
    assert rows(uri, tracker.run_id, "train/reward") == [(1, 2.0), (2, 2.5)]
    assert not [tag for tag in run.data.tags if "git" in tag]


def test_a_reopened_run_repeats_nothing_and_loses_nothing(uri: str) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="killed", tracking_uri=uri)
    for step in (1, 2, 3):
        tracker.log_metrics(step, {"train/reward": float(step), "val/reward/mean": 0.5 * step})
    again = MlflowTracker.open(PROFILE, run_name="killed", tracking_uri=uri, resume_run_id=tracker.run_id)
    assert again.run_id == tracker.run_id
    # Steps 2 and 3 are trained again after the kill: other numbers, the first ones stay.
    for step in (2, 3, 4):
        again.log_metrics(step, {"train/reward": 10.0 * step, "val/reward/mean": 1.0, "train/kl": 0.0})
    assert rows(uri, again.run_id, "train/reward") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert rows(uri, again.run_id, "train/kl") == [(2, 0.0), (3, 0.0), (4, 0.0)]
    assert again.history()["val/reward/mean"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 1.0)]


def test_checkpoints_are_logged_models_found_by_their_metric(uri: str, tmp_path: Path) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="models", tracking_uri=uri)
    for step, reward in ((0, 2.0), (10, 11.0), (20, 9.0)):
        metrics = {"val/reward/mean": reward, "val/matches/mean": 0.9, "train/reward": 1.0}
        tracker.log_metrics(step, metrics)
        tracker.log_checkpoint(step, adapter(tmp_path / f"{step:04d}", str(step).encode()), metrics)
        tracker.log_checkpoint_metrics(step, {"test/reward": reward - 1})
    client = MlflowClient(uri)
    found = client.search_logged_models(
        [tracker.experiment_id],
        filter_string=f"source_run_id = '{tracker.run_id}'",
        order_by=[{"field_name": "metrics.val/reward/mean", "ascending": False}],
    )
    assert [model.params["step"] for model in found] == ["10", "20", "0"]
    assert {str(model.status) for model in found} == {"READY"}
    best = found[0]
    assert {metric.key: metric.value for metric in best.metrics} == {
        "val/reward/mean": 11.0,
        "val/matches/mean": 0.9,
        "test/reward": 10.0,
    }
    files = {Path(file.path).name for file in client.list_logged_model_artifacts(best.model_id)}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    # The metrics of a model are those of the run, not a second copy of them.
    assert rows(uri, tracker.run_id, "val/reward/mean") == [(0, 2.0), (10, 11.0), (20, 9.0)]

    again = MlflowTracker.open(PROFILE, run_name="models", tracking_uri=uri, resume_run_id=tracker.run_id)
    again.log_checkpoint(10, tmp_path / "0010", {"val/reward/mean": 11.0})
    again.log_checkpoint_metrics(10, {"test/reward": 10.0})
    models = client.search_logged_models([tracker.experiment_id], f"source_run_id = '{tracker.run_id}'")
    assert len(models) == 3


def test_titles_are_a_table_that_a_repetition_replaces(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="titles", tracking_uri=uri)
    tracker.log_titles("val-step-0010", [{"id": "1", "title": "old", "reward": 1.0}])
    tracker.log_titles("val-step-0010", [{"id": "1", "title": "Ünïcode <b>", "reward": 2.0, "time": None}])
    # load_table searches in the process-wide store.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    table = MlflowClient(uri).load_table(tracker.experiment_id, "titles/val-step-0010.json", run_ids=[tracker.run_id])
    assert table["title"].tolist() == ["Ünïcode <b>"] and table["reward"].tolist() == [2.0]
    tag = MlflowClient(uri).get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"]
    assert tag.count("val-step-0010") == 1


def test_the_reward_curve_is_a_picture(uri: str) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="curve", tracking_uri=uri)
    for step in range(11):
        tracker.log_metrics(step, {"train/reward": 2 + step / 10} if step else {"val/reward/mean": 2.0})
    tracker.log_metrics(10, {"val/reward/mean": 3.0})
    tracker.log_reward_curve(best_step=10)
    path = MlflowClient(uri).download_artifacts(tracker.run_id, "reward_curve.png")
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def note_of(uri: str, run_id: str) -> str:
    return MlflowClient(uri).get_run(run_id).data.tags["mlflow.note.content"]


def test_a_run_is_described_from_its_start_on(uri: str) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="described", tracking_uri=uri, note="What it is.")
    assert note_of(uri, tracker.run_id) == "What it is."
    again = MlflowTracker.open(
        PROFILE, run_name="described", tracking_uri=uri, note="Another.", resume_run_id=tracker.run_id
    )
    assert note_of(uri, tracker.run_id) == "What it is."
    again.describe("What came of it.")
    assert note_of(uri, tracker.run_id) == "What came of it."


def test_compared_runs_are_children_that_lead_to_the_newest_report(uri: str) -> None:
    names = ("seed-1", "seed-2", "comparison", "later-comparison")
    kinds: tuple[Kind, ...] = ("training", "training", "comparison", "comparison")
    one, two, first, second = (
        MlflowTracker.open(PROFILE, run_name=name, tracking_uri=uri, kind=kind, note=f"Note of {name}.")
        for name, kind in zip(names, kinds, strict=True)
    )
    first.adopt([one.run_id, two.run_id])
    first.adopt([one.run_id, two.run_id])
    second.adopt([two.run_id])
    two.describe("Evaluated since.")
    client = MlflowClient(uri)
    for child, note, parent in ((one, "Note of seed-1.", first), (two, "Evaluated since.", second)):
        link = f"[report]({parent.page('report.html')})"
        assert note_of(uri, child.run_id) == f"{note}\n\nCompared with others: {link}."
        assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    children = client.search_runs([first.experiment_id], f"tags.mlflow.parentRunId = '{second.run_id}'")
    assert [run.info.run_id for run in children] == [two.run_id]
    kinds_found = client.search_runs([first.experiment_id], "tags.kind = 'comparison'")
    assert {run.info.run_name for run in kinds_found} == {"comparison", "later-comparison"}
    assert all("engine" not in run.data.tags for run in kinds_found)


def test_a_run_that_mlflow_does_not_know_is_no_child(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    child, parent = (MlflowTracker.open(PROFILE, run_name=name, tracking_uri=uri) for name in ("child", "parent"))
    with caplog.at_level(logging.WARNING):
        parent.adopt(["0123456789abcdef0123456789abcdef", child.run_id])
    assert "refused child 0123456789abcdef0123456789abcdef" in caplog.text
    assert MlflowClient(uri).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_what_the_machine_does_is_recorded_and_goes_on_when_a_run_is_reopened(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = MlflowTracker.open(PROFILE, run_name="machine", tracking_uri=uri)
    tracker.log_metrics(1, {"train/reward": 1.0})
    name, lengths = "system/cpu_utilization_percentage", []
    for _ in range(2):
        before = lengths[-1] if lengths else 0
        with system_metrics(tracker.run_id, uri):
            end = time.monotonic() + 60
            while len(rows(uri, tracker.run_id, name)) < before + 2 and time.monotonic() < end:
                time.sleep(0.05)
        found = rows(uri, tracker.run_id, name)
        assert [step for step, _ in found] == list(range(len(found)))
        lengths.append(len(found))
    assert lengths[0] >= 2 and lengths[1] >= lengths[0] + 2
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
    # They are no part of what training logged.
    again = MlflowTracker.open(PROFILE, run_name="machine", tracking_uri=uri, resume_run_id=tracker.run_id)
    assert again.history() == {"train/reward": [(1, 1.0)]}


def test_at_the_start_an_unreachable_server_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{port}.*could not start a run.*\n.*MLFLOW_TRACKING_URI"):
        MlflowTracker.open(PROFILE, run_name="x", tracking_uri=f"http://127.0.0.1:{port}")


def test_at_the_start_an_unknown_run_is_a_clear_error(uri: str) -> None:
    with pytest.raises(ServiceUnavailable, match="reopen run 0123456789abcdef0123456789abcdef"):
        MlflowTracker.open(PROFILE, run_name="x", tracking_uri=uri, resume_run_id="0123456789abcdef0123456789abcdef")


def test_while_training_a_failure_is_a_warning_and_is_made_up_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = default_tracking_uri(tmp_path)
    tracker = MlflowTracker.open(PROFILE, run_name="outage", tracking_uri=uri, retry_pause_s=0)
    tracker.log_metrics(1, {"train/reward": 1.0})
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("ALTER TABLE metrics RENAME TO metrics_away")
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics(2, {"train/reward": 2.0})
        tracker.log_metrics(3, {"train/reward": 3.0})
    assert "did not store metrics of step 2" in caplog.text and "2 waiting" in caplog.text
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("ALTER TABLE metrics_away RENAME TO metrics")
    tracker.log_metrics(4, {"train/reward": 4.0})
    assert rows(uri, tracker.run_id, "train/reward") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_what_can_never_be_stored_does_not_hold_up_the_rest(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker.open(PROFILE, run_name="pruned", tracking_uri=uri)
    with caplog.at_level(logging.WARNING):
        tracker.log_checkpoint(5, tmp_path / "pruned-meanwhile", {"val/reward/mean": 1.0})
    tracker.log_metrics(6, {"train/reward": 1.0})
    assert "refused checkpoint 5" in caplog.text
    assert rows(uri, tracker.run_id, "train/reward") == [(6, 1.0)]


def test_the_experiment_keeps_its_artifacts_beside_the_database(tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path / "runs")
    MlflowTracker.open(PROFILE, run_name="x", tracking_uri=uri)
    experiment = MlflowClient(uri).get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == (tmp_path / "runs" / "mlartifacts").as_uri()
