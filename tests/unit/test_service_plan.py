"""The services of one machine: the state file, reused process ids, ports, commands, and who uses what runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import is_alive, wait_until_gone

from tasks.services import processes
from tasks.services.plan import TITLES, Service, configured_elsewhere, plan, service_options
from tasks.services.ports import choose_ports
from tasks.services.state import (
    ServiceRecord,
    ServiceState,
    is_running,
    new_mark,
    read_state,
    services_in_use,
    write_state,
)
from tasks.titles.config import ConfiguredSettings, Settings
from tasks.titles.errors import ConfigError, DataError

ADDRESS_VARIABLES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "REWARD_MODEL_URL")
PORTS = {"prefect": 1, "mlflow": 2, "reward": 3, "worker": 4}
WAIT = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def nothing_is_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    databases = ("PREFECT_API_DATABASE_CONNECTION_URL", "MLFLOW_BACKEND_STORE_URI")
    others = ("PREFECT_API_AUTH_STRING", "MLFLOW_SERVER_ALLOWED_HOSTS", "REWARD_MODEL_API_KEY", "RUNS_DIR")
    for name in (*ADDRESS_VARIABLES, *databases, *others):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def record_of(process: psutil.Process, name: str = "mlflow", **changes: object) -> ServiceRecord:
    address = f"http://127.0.0.1:{PORTS[name]}"
    record = ServiceRecord(
        name, TITLES[name], address, f"{address}/health", process.pid, process.create_time(), "x.log", new_mark()
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def service(code: str, log: Path, name: str = "mlflow") -> Service:
    return Service(name, (sys.executable, "-u", "-c", code), "http://127.0.0.1:1", "http://127.0.0.1:1/health", log)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[processes.Started]]:
    """What a test has started; whatever is left of it is killed."""
    all_of_it: list[processes.Started] = []
    yield all_of_it
    for one in all_of_it:
        for pid in processes.survivors([one.record], [one.record.mark]):
            os.kill(pid, signal.SIGKILL)
        one.process.wait()


# --- state -----------------------------------------------------------------------------------------


def test_the_state_comes_back_as_it_was_written_and_goes_when_nothing_is_left(tmp_path: Path) -> None:
    assert read_state(tmp_path) == ServiceState()
    one = record_of(psutil.Process())
    other = record_of(psutil.Process(), "reward", reward_model="models/of mine")
    state = ServiceState(marks=("a", "b")).with_record(one).with_record(other)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert state.with_record(replace(one, pid=1)).record("mlflow") == replace(one, pid=1)
    assert state.without(["mlflow"]).services == (other,)
    write_state(tmp_path, ServiceState())
    assert not list((tmp_path / "services").iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"services": [{"name": "mlflow"}], "marks": []}', '{"services": []}'])
def test_a_state_that_cannot_be_read_is_told_with_what_to_do(text: str, tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "state.json").write_text(text)
    with pytest.raises(DataError, match=r"state\.json cannot be read.*remove the file"):
        read_state(tmp_path)


def test_a_process_is_known_by_its_id_and_its_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", WAIT])
    record = record_of(psutil.Process(child.pid))
    try:
        assert is_running(record)
        assert not is_running(replace(record, started=record.started - 60)), "another process has the id now"
    finally:
        child.kill()
        # A zombie until somebody waits for it.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_running(record)
        child.wait()
    assert not is_running(record)


# --- who uses what runs ----------------------------------------------------------------------------


def test_commands_use_running_services_unless_other_addresses_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    this = psutil.Process()
    records = [record_of(this, name) for name in ("prefect", "mlflow")]
    state = ServiceState((*records, record_of(this, "reward", reward_model="/one")), ("a",))
    write_state(Path("runs"), state)
    settings = Settings()
    assert settings.prefect_api_url == "http://127.0.0.1:1/api"
    assert settings.tracking_uri == "http://127.0.0.1:2"
    assert settings.reward_server_of("/one") == "http://127.0.0.1:3"
    assert settings.reward_server_of("/another") is None, "it would be scored by the wrong model"
    assert configured_elsewhere(ConfiguredSettings()) == {}

    for name in ADDRESS_VARIABLES:
        monkeypatch.setenv(name, f"http://elsewhere/{name}")
    settings = Settings()
    assert settings.prefect_api_url == "http://elsewhere/PREFECT_API_URL"
    assert settings.tracking_uri == "http://elsewhere/MLFLOW_TRACKING_URI"
    assert settings.reward_server_of("/one") == settings.reward_server_of("/another")
    assert set(configured_elsewhere(ConfiguredSettings())) == {"prefect", "mlflow", "reward"}


def test_addresses_of_services_that_are_all_gone_are_not_used() -> None:
    gone = record_of(psutil.Process(), started=1.0)
    write_state(Path("runs"), ServiceState((gone,), ("a",)))
    assert services_in_use(Path("runs")) == {}
    assert Settings().tracking_uri.startswith("sqlite:///")

    alive = record_of(psutil.Process(), "prefect")
    write_state(Path("runs"), ServiceState((gone, alive), ("a",)))
    assert Settings().tracking_uri == gone.address, "a dead service must not be passed over silently"


# --- ports -----------------------------------------------------------------------------------------


def test_free_ports_are_given_as_wanted_and_any_free_one_for_0() -> None:
    ports = choose_ports("127.0.0.1", dict.fromkeys(TITLES, 0), TITLES)
    assert len(set(ports.values())) == len(TITLES) and 0 not in ports.values()
    assert choose_ports("127.0.0.1", ports, TITLES) == ports
    assert list(ports) == list(TITLES)


def test_every_taken_port_is_named_with_who_holds_it_and_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        wanted = {"prefect": one.getsockname()[1], "mlflow": two.getsockname()[1], "reward": 0}
        with pytest.raises(ConfigError) as caught:
            choose_ports("127.0.0.1", wanted, TITLES)
    first, second, last = str(caught.value).splitlines()
    assert first.startswith(f"Port {wanted['prefect']} for the Prefect server is taken by process {os.getpid()} (")
    assert "--port-prefect or HN_TITLES_PORT_PREFECT" in first and "--port-mlflow or HN_TITLES_PORT_MLFLOW" in second
    assert last == "Port 0 takes any free one."


def test_one_port_for_two_services_is_told_as_such() -> None:
    free = choose_ports("127.0.0.1", {"mlflow": 0}, TITLES)["mlflow"]
    with pytest.raises(ConfigError, match=f"Port {free} for the reward server is wanted for 'mlflow' too"):
        choose_ports("127.0.0.1", {"mlflow": free, "reward": free}, TITLES)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        choose_ports(host, {"mlflow": 0}, TITLES)


# --- options and commands --------------------------------------------------------------------------


def test_flags_come_before_the_environment_and_it_before_dotenv(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("HN_TITLES_PORT_MLFLOW=5001\nHN_TITLES_PORT_REWARD=7001\nHN_TITLES_PORT_WORKER=8001\n")
    monkeypatch.setenv("HN_TITLES_PORT_REWARD", "7002")
    monkeypatch.setenv("HN_TITLES_PORT_WORKER", "8002")
    options = service_options(port_worker=8003, port_mlflow=None)
    assert options.ports == {"prefect": 4200, "mlflow": 5001, "reward": 7002, "worker": 8003}
    monkeypatch.setenv("HN_TITLES_PORT_WORKER", "many")
    with pytest.raises(ConfigError, match="port_worker"):
        service_options()


def test_everything_is_kept_in_the_runs_directory_unless_databases_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def planned() -> dict[str, Service]:
        services = plan(service_options(), ConfiguredSettings(), PORTS, reward_model="/m", device="cpu")
        return {one.name: one for one in services}

    key = "PREFECT_API_DATABASE_CONNECTION_URL"
    embedded = planned()
    assert list(embedded) == list(TITLES)
    assert embedded["prefect"].environment[key] == f"sqlite+aiosqlite:///{tmp_path}/runs/services/prefect.db"
    assert embedded["mlflow"].environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert embedded["worker"].environment["RUNS_DIR"] == str(tmp_path / "runs")

    Path(".env").write_text(
        f"{key}=postgresql+asyncpg://me:secret@db/p\nMLFLOW_BACKEND_STORE_URI=postgresql://me:secret@db/m\n"
        "REWARD_MODEL_API_KEY=secret\nPREFECT_API_AUTH_STRING=me:secret\n"
    )
    served = planned()
    assert served["prefect"].environment["PREFECT_SERVER_API_AUTH_STRING"] == "me:secret"
    assert served["worker"].environment["PREFECT_API_AUTH_STRING"] == "me:secret"
    assert served["worker"].ready_headers == {"Authorization": "Basic bWU6c2VjcmV0"} and "secret" not in repr(served)
    assert served["prefect"].environment[key] == "postgresql+asyncpg://me:secret@db/p"
    assert served["mlflow"].environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@db/m"
    assert served["reward"].environment["REWARD_SERVER_API_KEY"] == "secret"
    assert served["worker"].environment["REWARD_MODEL_API_KEY"] == "secret", "flow runs see no .env"
    assert "--default-artifact-root" in embedded["mlflow"].command
    assert "--default-artifact-root" not in served["mlflow"].command
    assert all("secret" not in word for one in served.values() for word in one.command), "everybody can read commands"


@pytest.mark.parametrize(
    ("device", "pool", "expected"), [("cpu", None, "cpu"), ("cuda", None, "gpu"), ("cpu", "x", "x")]
)
def test_the_worker_is_for_the_pool_of_its_machine(device: str, pool: str | None, expected: str) -> None:
    *_, worker = plan(service_options(pool=pool), ConfiguredSettings(), PORTS, reward_model="/m", device=device)
    assert re.search(rf"--type process --pool {expected} ", " ".join(worker.command))
    assert worker.after == "prefect" and worker.ready == (
        f"http://127.0.0.1:1/api/work_pools/{expected}",
        '"status":"READY"',
    )


def test_a_worker_brings_the_pool_that_it_wants_where_there_is_none(tmp_path: Path) -> None:
    def command(template: Path | None) -> tuple[str, ...]:
        *_, worker = plan(
            service_options(), ConfiguredSettings(), PORTS, reward_model="/m", device="cpu", job_template=template
        )
        return worker.command

    assert command(tmp_path)[-2:] == ("--base-job-template", str(tmp_path))
    assert "--base-job-template" not in command(None)


def test_a_server_that_listens_everywhere_is_asked_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api")
    services = plan(
        service_options(host="0.0.0.0"),
        ConfiguredSettings(),
        {"reward": 3, "worker": 4},
        reward_model="/m",
        device="cpu",
    )
    reward, worker = services
    assert reward.health_url == "http://127.0.0.1:3/health" and "0.0.0.0" in reward.command
    assert worker.environment["PREFECT_API_URL"] == "http://head:4200/api" and worker.after is None


@pytest.mark.parametrize(
    ("host", "set_", "expected"),
    [
        ("127.0.0.1", None, None),
        ("0.0.0.0", "only.this", None),
        ("0.0.0.0", None, rf"127\.0\.0\.1:\*.*,172\.31\.\*,.*{re.escape(socket.gethostname())}:\*"),
    ],
)
def test_mlflow_knows_this_machines_names_where_others_reach_it(
    host: str, set_: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "MLFLOW_SERVER_ALLOWED_HOSTS"
    if set_:
        monkeypatch.setenv(name, set_)
    options = service_options(host=host)
    (mlflow,) = plan(options, ConfiguredSettings(), {"mlflow": 1}, reward_model="/m", device="cpu")
    hosts = mlflow.environment.get(name)
    assert (hosts is None) if expected is None else re.search(expected, hosts or "")


# --- processes -------------------------------------------------------------------------------------


def wait_for(text: str, log: Path) -> list[str]:
    for _ in range(600):
        if text in log.read_text():
            return log.read_text().split()
        time.sleep(0.05)
    raise AssertionError(f"no '{text}' within 30 s: {log.read_text()}")


def test_stop_ends_a_service_that_is_deaf_its_sessions_and_what_its_death_left(
    started: list[processes.Started], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE_S", 0.5)
    log = tmp_path / "log"
    head = "import subprocess, sys, time\n"
    spawn = f"child = subprocess.Popen([sys.executable, '-u', '-c', {DEAF!r}], start_new_session=True)\n"
    mark = new_mark()
    started.append(processes.start(service(head + spawn + "print(child.pid)\n" + WAIT, log), mark))
    child = int(next(word for word in wait_for("deaf", log) if word.isdigit()))
    record = started[0].record
    assert os.getsid(record.pid) == record.pid != os.getsid(0)
    assert processes.survivors([record], []) == sorted([record.pid, child])

    os.kill(record.pid, signal.SIGKILL)
    started[0].process.wait()
    assert processes.survivors([record], []) == [child], "its child is in another session, and still its own"
    assert processes.stop([record], [mark]) == 1
    wait_until_gone(child)
    assert processes.stop([record], [mark]) == 0


def test_a_process_that_has_the_id_of_a_dead_service_is_left_alone(
    started: list[processes.Started], tmp_path: Path
) -> None:
    started.append(processes.start(service(WAIT, tmp_path / "log"), new_mark()))
    before = replace(started[0].record, started=started[0].record.started - 60, mark=new_mark())
    assert processes.stop([before], [before.mark]) == 0
    assert is_alive(started[0].record.pid)


def test_what_an_up_has_started_without_telling_is_found_by_its_mark(
    started: list[processes.Started], tmp_path: Path
) -> None:
    mark = new_mark()
    started.append(processes.start(service(WAIT, tmp_path / "log"), mark))
    assert processes.stop([], [new_mark()]) == 0
    assert processes.stop([], [mark]) == 1
    assert not is_alive(started[0].record.pid)
