"""The servers of `hn-titles up`, used as on any day: runs triggered, followed, cancelled and read back over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient
from processes import MARK, processes_of

from tasks.services.state import ServiceRecord, read_state
from tasks.starter.paths import HELDOUT_REWARD_MODEL
from tasks.starter.world import generate_stories

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("prefect", "mlflow", "reward", "worker")
CONFIGURED = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "REWARD_MODEL_URL", "RUNS_DIR", "MLFLOW_BACKEND_STORE_URI")
SMALL = [
    "minimum_score=0",
    "groups_per_step=3",
    "group_size=4",
    "val_stories=4",
    "test_stories=4",
    "max_completion_tokens=24",
    "eval_steps=2",
]
ART, TRL = "daily-art", "daily-trl"
"""Names of the runs."""
# Another model than the one that runs as a service, so that this run starts a reward server of its own.
OF_TRL = {"run_name": TRL, "max_steps": 6, "overrides": [*SMALL, f"reward_model={HELDOUT_REWARD_MODEL}"]}
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Office:
    """A folder with its running services."""

    folder: Path
    environment: dict[str, str]

    def hn_titles(self, *arguments: str) -> str:
        """Run a command to its end and return what it said; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def service(self, name: str) -> ServiceRecord:
        return {record.name: record for record in read_state(self.folder / "runs").services}[name]

    def prefect(self, method: str, path: str, **body: Any) -> Any:
        """Ask Prefect's API; again, as Prefect's own client does, where its database was busy."""
        url = f"{self.service('prefect').address}/api{path}"
        for _ in range(10):
            content = body if method == "POST" else None
            answer = httpx.request(method, url, json=content, timeout=30, trust_env=False)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(self.service("mlflow").address)

    # --- flow runs -----------------------------------------------------------------------------

    def trigger(self, deployment: str, **parameters: Any) -> str:
        """Start a run as the UI's button does and return its flow run's id."""
        found = self.prefect("GET", f"/deployments/name/{deployment}")
        values = {**found["parameters"], "stories": "stories.jsonl", **parameters}
        run = self.prefect("POST", f"/deployments/{found['id']}/create_flow_run", parameters=values)
        return str(run["id"])

    def set_state(self, flow_run: str, type_: str, name: str) -> None:
        answer = self.prefect("POST", f"/flow_runs/{flow_run}/set_state", state={"type": type_, "name": name})
        assert answer["status"] == "ACCEPT", answer

    def state(self, flow_run: str) -> str:
        return str(self.prefect("GET", f"/flow_runs/{flow_run}")["state"]["name"])

    def wait_for_state(self, flow_run: str, *names: str) -> None:
        ended = {"Completed", "Failed", "Crashed", "Cancelled"}
        self.wait_until(lambda: self.state(flow_run) in {*names, *ended}, f"none of {names}")
        assert self.state(flow_run) in names, "\n".join(self.log(flow_run))

    def wait_for_step(self, flow_run: str, step: int) -> None:
        """Wait until the flow run's page shows the training beyond `step`."""

        def there() -> bool:
            assert self.state(flow_run) not in {"Completed", "Failed", "Crashed"}, "\n".join(self.log(flow_run))
            page = self.artifacts(flow_run).get("training")
            return page is not None and page["data"] >= 100.0 * step / OF_TRL["max_steps"]  # type: ignore[operator]

        self.wait_until(there, f"step {step} was never shown")

    def artifacts(self, flow_run: str) -> dict[str, dict[str, Any]]:
        only = {"id": {"any_": [flow_run]}}
        return {found["key"]: found for found in self.prefect("POST", "/artifacts/filter", flow_runs=only)}

    def log(self, flow_run: str) -> list[str]:
        found = self.prefect("POST", "/logs/filter", logs={"flow_run_id": {"any_": [flow_run]}}, limit=200)
        return [str(row["message"]) for row in found]

    def heartbeats(self, flow_run: str) -> int:
        """Return how many signs of life a flow run has given."""
        wanted = {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{flow_run}"]},
        }
        return int(self.prefect("POST", "/events/filter", filter=wanted)["total"])

    def slots_taken(self) -> int:
        return int(self.prefect("GET", "/v2/concurrency_limits/hn-titles-cpu")["active_slots"])

    # --- processes -----------------------------------------------------------------------------

    def started_by_worker(self) -> list[psutil.Process]:
        """Return the processes of flow runs: the worker's descendants, in whatever session."""
        return psutil.Process(self.service("worker").pid).children(recursive=True)

    def processes(self) -> list[str]:
        """Return the command lines of all that was started here and still runs."""
        return sorted(processes_of(self.folder))

    def wait_until(self, there: Callable[[], bool], otherwise: str, within_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + within_s
        while not there():
            assert time.monotonic() < deadline, f"{otherwise} within {within_s:g} s"
            time.sleep(0.25)


@contextmanager
def open_office(folder: Path) -> Iterator[Office]:
    """Start all services in `folder`, deploy, and stop them to the last process at the end."""
    rows = [json.dumps(asdict(story), default=lambda value: value.isoformat()) for story in generate_stories(240)]
    (folder / "stories.jsonl").write_text("\n".join(rows), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in CONFIGURED} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PREFECT_HOME": str(folder / "prefect"),
        # A worker looks for runs every 10 seconds otherwise.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        MARK: str(folder),
        **{f"HN_TITLES_PORT_{name.upper()}": "0" for name in SERVICES},
    }
    office = Office(folder, environment)
    try:
        office.hn_titles("up")
        office.hn_titles("deploy")
        yield office
    finally:
        office.hn_titles("down")
        assert office.processes() == []


@dataclass(frozen=True)
class Trained:
    """A training with ART from its trigger to its end."""

    flow_run: str
    lost: str
    """Another flow run, whose process was killed meanwhile with nobody there to tell Prefect: its machine has gone."""


def train_and_lose_machine(office: Office) -> Trained:
    """Trigger a training and follow it to its end; its time is used to have another run die unseen."""
    flow_run = office.trigger("train/train-art", run_name=ART, max_steps=3, overrides=SMALL)
    lost = _lose_machine(office)
    office.wait_for_state(flow_run, "Completed")
    return Trained(flow_run, lost)


def _lose_machine(office: Office) -> str:
    found = office.prefect("GET", "/deployments/name/prepare-data/prepare-data")
    # Pending from the first, so that the worker leaves it alone, which would tell Prefect of the end.
    pending = {"type": "PENDING", "name": "Pending"}
    flow_run = str(office.prefect("POST", f"/deployments/{found['id']}/create_flow_run", state=pending)["id"])
    address = f"{office.service('prefect').address}/api"
    heartbeats = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    with (office.folder / "lost.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect.engine", flow_run],
            cwd=office.folder,
            env={**office.environment, **heartbeats, "PREFECT_API_URL": address},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        office.wait_until(lambda: office.heartbeats(flow_run) > 0, "no heartbeat")
    finally:
        process.kill()
        process.wait()
    assert office.state(flow_run) == "Running"
    return flow_run


@dataclass(frozen=True)
class Cancelled:
    """A run that was cancelled while it trained."""

    flow_run: str
    started: list[str]
    """Command lines of what it had started."""
    left: list[psutil.Process]
    """What of it still ran half a minute after the request."""
    mlflow_status: str
    steps: list[int]
    """Steps with a checkpoint on disk."""


def cancel_in_training(office: Office) -> Cancelled:
    """Start a training with TRL, cancel it as the UI's button does, and look what is left."""
    flow_run = office.trigger("train/train-trl", **OF_TRL)
    office.wait_for_step(flow_run, 1)
    started = office.started_by_worker()
    commands = [" ".join(process.cmdline()) for process in started]
    office.set_state(flow_run, "CANCELLING", "Cancelling")
    _, left = psutil.wait_procs(started, timeout=30)
    office.wait_for_state(flow_run, "Cancelled")
    return Cancelled(flow_run, commands, left, office.mlflow.get_run(run_id(office, TRL)).info.status, steps(office))


@dataclass(frozen=True)
class Resumed:
    """The next run of the same name, whose worker was killed, and which was retried then."""

    flow_run: str
    after_kill: str
    slots: int
    left: list[psutil.Process]
    steps: list[int]


def resume_kill_and_retry(office: Office, cancelled: Cancelled) -> Resumed:
    """Continue the cancelled run, kill its worker outright, start another one and retry."""
    flow_run = office.trigger("train/train-trl", **OF_TRL)
    office.wait_for_step(flow_run, max(cancelled.steps) + 1)
    started = office.started_by_worker()
    os.kill(office.service("worker").pid, signal.SIGKILL)
    office.wait_for_state(flow_run, "Crashed")
    _, left = psutil.wait_procs(started, timeout=30)
    found = Resumed(flow_run, office.state(flow_run), office.slots_taken(), left, steps(office))
    office.hn_titles("up")
    office.set_state(flow_run, "SCHEDULED", "AwaitingRetry")
    office.wait_for_state(flow_run, "Completed")
    return found


def run_id(office: Office, run_name: str) -> str:
    """Return the id of a run in MLflow."""
    return str(json.loads((office.folder / "runs" / run_name / "run.json").read_text())["mlflow_run_id"])


def steps(office: Office) -> list[int]:
    """Return the steps of TRL's run that have a complete checkpoint."""
    from tasks.engines.checkpoints import complete_steps
    from tasks.engines.resume import checkpoints_folder

    return complete_steps(checkpoints_folder(office.folder / "runs" / TRL, "trl"))
