"""`hn-titles up`, `status` and `down` with the real servers: used, found again, and ended to the last process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient
from processes import MARK, processes_of, wait_until_none_is_left

from tasks.services.state import ServiceRecord, read_state
from tasks.titles.config import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["prefect", "mlflow", "reward", "worker"]
CONFIGURED = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "REWARD_MODEL_URL", "RUNS_DIR", "MLFLOW_BACKEND_STORE_URI")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own, any free ports, and nothing left at the end."""
    for name in CONFIGURED:
        monkeypatch.delenv(name, raising=False)
    for name in NAMES:
        monkeypatch.setenv(f"HN_TITLES_PORT_{name.upper()}", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    hn_titles("down")
    # The test's own process may carry the mark in its children alone.
    assert processes_of(tmp_path) == []


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def hn_titles(*arguments: str) -> tuple[int, str]:
    """Return exit code and output of a command."""
    process = start(*arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records(folder: Path) -> dict[str, ServiceRecord]:
    return {record.name: record for record in read_state(folder / "runs").services}


def test_everything_starts_is_used_survives_a_death_and_ends(workplace: Path) -> None:
    code, output = hn_titles("up")
    assert code == 0, output
    found = records(workplace)
    assert list(found) == NAMES and output.count("│ healthy │") == 4
    assert all(os.getsid(record.pid) == record.pid for record in found.values()), "they would end with the terminal"
    for record in found.values():
        assert httpx.get(record.health_url).status_code == 200
        assert Path(record.log).stat().st_size > 0

    # What other commands use, without any setting.
    settings = Settings()
    assert f"export PREFECT_API_URL={settings.prefect_api_url}" in output
    pools = httpx.post(f"{settings.prefect_api_url}/work_pools/filter", json={}).json()
    assert [(pool["name"], pool["type"], pool["status"]) for pool in pools] == [("cpu", "process", "READY")]
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    run = client.create_run("0")
    client.log_text(run.info.run_id, "kept", "note.txt")
    assert settings.reward_server_of(found["reward"].reward_model or "") == found["reward"].address

    # Its ports are taken for another folder's services.
    ports = {name: record.address.rpartition(":")[2] for name, record in found.items()}
    os.environ["RUNS_DIR"] = str(workplace / "other")
    try:
        code, output = hn_titles("up", *(word for name, port in ports.items() for word in (f"--port-{name}", port)))
    finally:
        del os.environ["RUNS_DIR"]
    assert code == 2 and "Traceback" not in output
    for name, port in ports.items():
        assert f"Port {port} for the {found[name].title} is taken by process" in output
        assert f"--port-{name} or HN_TITLES_PORT_{name.upper()}" in output

    os.kill(found["mlflow"].pid, signal.SIGKILL)
    code, output = hn_titles("status")
    assert code == 3 and output.count("│ healthy │") == 3 and output.count("│ gone    │") == 1

    code, output = hn_titles("up")
    assert code == 0 and output.count("│ healthy │") == 4 and output.count("runs already") == 3, output
    again = records(workplace)
    assert again["mlflow"].address == found["mlflow"].address and again["mlflow"].pid != found["mlflow"].pid
    assert {name: again[name].pid for name in NAMES if name != "mlflow"} == {
        name: found[name].pid for name in NAMES if name != "mlflow"
    }

    code, output = hn_titles("down")
    assert code == 0 and "processes have ended" in output
    assert processes_of(workplace) == [] and records(workplace) == {}
    assert hn_titles("status")[0] == 3
    # Without a server the same runs and files are there.
    alone = MlflowClient(tracking_uri=Settings().tracking_uri)
    assert [file.path for file in alone.list_artifacts(run.info.run_id)] == ["note.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_up_leaves_nothing(number: signal.Signals, workplace: Path) -> None:
    # As a script starts it in the background, which is not to matter; `nohup` has it ignore another, and that must not
    # come from whoever runs the tests.
    how = {signal.SIGINT: signal.SIG_IGN, signal.SIGHUP: signal.SIG_DFL}
    ours = {one: signal.signal(one, handler) for one, handler in how.items()}
    try:
        process = start("up")
    finally:
        for one, handler in ours.items():
            signal.signal(one, handler)
    assert process.stdout is not None
    assert any("reward server: starts" in line for line in process.stdout)
    assert len(processes_of(workplace)) >= 4, "itself and three services"
    process.send_signal(number)
    assert process.wait(timeout=120) == 130
    assert processes_of(workplace) == [] and records(workplace) == {}


def test_what_a_killed_up_has_started_is_found_by_down(workplace: Path) -> None:
    process = start("up")
    assert process.stdout is not None
    assert any("reward server: starts" in line for line in process.stdout)
    process.kill()
    process.wait()
    assert len(processes_of(workplace)) >= 3, "three services"
    code, output = hn_titles("down")
    assert code == 0, output
    wait_until_none_is_left(workplace)


def test_a_service_that_does_not_start_stops_the_others_and_shows_its_log(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "nonsense://nowhere")
    code, output = hn_titles("up")
    assert code == 3, output
    assert "The MLflow server ended with exit code" in output and "The end of " in output
    assert "nonsense" in output.partition("The end of ")[2]
    assert processes_of(workplace) == [] and records(workplace) == {}
