"""Used every day: real servers and a real worker; runs triggered, watched, cancelled, killed and resumed over HTTP."""

from __future__ import annotations

import json
import os
import signal

import pytest
from daily_parts import ART, OF_TRL, TRL, Cancelled, Office, Resumed, Trained, run_id
from processes import wait_until_gone

from tasks.engines.tracker import run_page

pytestmark = pytest.mark.slow


def test_an_active_schedule_makes_runs_and_a_paused_one_none(office: Office) -> None:
    def planned(deployment: str) -> int:
        wanted = {"name": {"any_": [deployment]}}
        states = {"state": {"type": {"any_": ["SCHEDULED"]}}}
        return int(office.prefect("POST", "/flow_runs/count", deployments=wanted, flow_runs=states))

    office.wait_until(lambda: planned("prepare-data") > 0, "nothing was planned")
    assert planned("nightly") == 0


def test_a_run_is_triggered_and_watched_and_its_results_are_read_back(office: Office, trained: Trained) -> None:
    flow_run = office.prefect("GET", f"/flow_runs/{trained.flow_run}")
    assert (flow_run["state"]["name"], flow_run["name"]) == ("Completed", f"train-{ART}")
    tasks = office.prefect("POST", "/task_runs/filter", flow_runs={"id": {"any_": [trained.flow_run]}})
    groups = [task for task in tasks if task["name"].startswith("group-")]
    assert len(groups) == 3 * 3 and all(task["state"]["type"] == "COMPLETED" for task in groups)

    found = office.artifacts(trained.flow_run)
    assert found.keys() == {"stories", "training", "training-figures", "validation-titles"}
    assert found["training"]["data"] == 100.0
    assert found["training"]["description"].startswith("Step 3 of 3 · reward ")
    page = f"{office.service('mlflow').address}/{run_page('1', run_id(office, ART))}"
    figures = found["training-figures"]["data"]
    assert f"[run {ART}]({page})" in figures and "Dropped trajectories: 0 of 36" in figures
    titles = json.loads(found["validation-titles"]["data"])
    assert len(titles) == 4 and all(row["title"] and row["supported"] in ("yes", "no") for row in titles)
    assert any("Step 3 of 3: training reward" in line for line in office.log(trained.flow_run))

    run = office.mlflow.get_run(run_id(office, ART))
    assert run.info.status == "FINISHED" and run.data.params["engine"] == "art"
    history = office.mlflow.get_metric_history(run.info.run_id, "train/reward")
    assert [row.step for row in history] == [1, 2, 3]


def test_a_cancelled_run_leaves_no_process_and_keeps_its_last_checkpoint(office: Office, cancelled: Cancelled) -> None:
    own = ("prefect.engine", "tasks.engines.trl_engine.process", "reward_server")
    for part in own:
        assert any(part in command for command in cancelled.started), f"{part} never ran: {cancelled.started}"
    assert cancelled.left == []
    assert cancelled.mlflow_status == "KILLED"
    assert max(cancelled.steps) in range(1, 6)
    assert office.prefect("GET", f"/flow_runs/{cancelled.flow_run}")["state"]["name"] == "Cancelled"


def test_the_next_run_goes_on_and_a_killed_worker_neither_holds_its_slot_nor_seems_to_run(
    cancelled: Cancelled, resumed: Resumed
) -> None:
    assert (resumed.after_kill, resumed.slots, resumed.left) == ("Crashed", 0, [])
    assert max(resumed.steps) > max(cancelled.steps)


def test_a_retry_goes_on_where_the_crash_was_and_nothing_is_twice(office: Office, resumed: Resumed) -> None:
    flow_run = office.prefect("GET", f"/flow_runs/{resumed.flow_run}")
    assert (flow_run["state"]["name"], flow_run["run_count"]) == ("Completed", 2)
    log = office.log(resumed.flow_run)
    assert any("tasks.engines.ledger: Step 6 of 6: training reward" in line for line in log), "the trainer's own lines"
    rows = (office.folder / "runs" / TRL / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(OF_TRL["max_steps"] + 1))  # type: ignore[operator]
    run = office.mlflow.get_run(run_id(office, TRL))
    assert run.info.status == "FINISHED"
    history = office.mlflow.get_metric_history(run.info.run_id, "train/reward")
    assert [row.step for row in history] == [1, 2, 3, 4, 5, 6]


def test_both_engines_runs_are_beside_each_other_in_mlflow(office: Office, trained: Trained, resumed: Resumed) -> None:
    client = office.mlflow
    runs = [client.get_run(run_id(office, name)) for name in (ART, TRL)]
    assert len({run.info.experiment_id for run in runs}) == 1
    named = [{name for name in run.data.metrics if name.startswith(("train/", "val/"))} for run in runs]
    assert {"train/reward", "val/reward/mean", "train/trajectories_dropped"} <= named[0] & named[1]
    models = client.search_logged_models(
        [runs[0].info.experiment_id], order_by=[{"field_name": "metrics.val/reward/mean", "ascending": False}]
    )
    assert {model.source_run_id for model in models} == {run.info.run_id for run in runs}


def test_a_run_whose_machine_is_gone_is_found_by_its_silence(
    office: Office, trained: Trained, resumed: Resumed
) -> None:
    office.wait_until(lambda: office.state(trained.lost) == "Crashed", "the automation did not mark it")
    assert "no heartbeat" in office.prefect("GET", f"/flow_runs/{trained.lost}")["state"]["message"]


def test_the_server_may_restart_without_forgetting_who_holds_a_slot(office: Office, resumed: Resumed) -> None:
    lease = office.prefect("POST", "/v2/concurrency_limits/increment-with-lease", names=["hn-titles-cpu"], slots=1)
    before = office.service("prefect")
    os.kill(before.pid, signal.SIGKILL)
    wait_until_gone(before.pid)
    office.hn_titles("up")
    # A server that has forgotten the lease refuses to renew it, and never gives its slot back.
    office.prefect("POST", f"/v2/concurrency_limits/leases/{lease['lease_id']}/renew", lease_duration=60)
    assert office.slots_taken() == 1
    office.prefect("POST", "/v2/concurrency_limits/decrement-with-lease", lease_id=lease["lease_id"])
    assert office.slots_taken() == 0
