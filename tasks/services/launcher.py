"""Starts the services of one machine together, stops them together, and tells how they are."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tasks.services import processes
from tasks.services.plan import TITLES, Service, ServiceOptions, configured_elsewhere, health_headers, plan
from tasks.services.ports import choose_ports
from tasks.services.state import (
    ServiceRecord,
    ServiceState,
    is_running,
    new_mark,
    read_state,
    services_folder,
    write_state,
)
from tasks.titles.child_process import end_of_log
from tasks.titles.config import ConfiguredSettings
from tasks.titles.errors import ConfigError, ServiceUnavailable
from tasks.titles.run_directory import write_json

# Four interpreters that import at the same time, and databases that are created, on a laptop.
_START_TIMEOUT_S = 300.0
_ASK_TIMEOUT_S = 5.0
_POLL_S = 0.25

Listener = Callable[[str, str], None]
"""Hears a service's title and what has become of it."""


@dataclass(frozen=True)
class ServiceStatus:
    """How a service is now."""

    record: ServiceRecord
    health: str
    """`healthy`, or what is wrong."""

    @property
    def healthy(self) -> bool:
        """Whether it runs and says that it is well."""
        return self.health == "healthy"


def up(
    options: ServiceOptions,
    settings: ConfiguredSettings,
    *,
    explicit_ports: Mapping[str, int],
    reward_model: str,
    device: str,
    job_template: Mapping[str, Any] | None = None,
    tell: Listener,
) -> None:
    """Start what is not running yet and wait until it is well; what was started is stopped where anything fails.

    A service whose address the settings give is left out. What died since the last `up` gets its old port again.
    `job_template` is what the worker's pool starts with where there is none yet: a worker looks only every 30 seconds
    whether its pool is another one by now.

    Raises `ConfigError` where a port is taken or other ports are asked for while services run, `ServiceUnavailable`
    with the end of the log where a service ends or is not well in time.
    """
    runs_dir = settings.runs_dir
    with _locked(runs_dir):
        state = read_state(runs_dir)
        running = [record for record in state.services if is_running(record)]
        for record in running:
            tell(record.title, f"runs already, {record.address}")
        wanted = _wanted_ports(options, settings, state, running, explicit_ports, tell)
        names = {record.name for record in running}
        gone = [record for record in state.services if record.name not in names]
        # Children of a dead service, and what a killed `up` had started, would hold ports and databases.
        processes.stop(gone, () if running else state.marks)
        ports = choose_ports(options.host, wanted, TITLES)
        known = {record.name: int(record.address.rpartition(":")[2]) for record in running}
        template = None
        if job_template:
            template = services_folder(runs_dir).resolve() / "job_template.json"
            write_json(template, job_template)
        services = plan(
            options,
            settings,
            {**known, **ports},
            reward_model=reward_model,
            device=device,
            job_template=template,
        )
        _start([service for service in services if service.name in ports], state, settings, tell)


def down(runs_dir: Path, tell: Listener) -> int:
    """Stop everything that `up` has started and return how many processes were ended.

    Raises `ServiceUnavailable` where one cannot be ended.
    """
    with _locked(runs_dir):
        state = read_state(runs_dir)
        ended = processes.stop(state.services, state.marks, lambda title: tell(title, "stops"))
        left = processes.survivors(state.services, state.marks)
        if left:
            raise ServiceUnavailable(
                f"These processes could not be ended: {', '.join(map(str, left))}. Give the command again."
            )
        write_state(runs_dir, ServiceState())
        return ended


def status(settings: ConfiguredSettings) -> list[ServiceStatus]:
    """Return how each service is that `up` has started and `down` has not stopped."""
    records = sorted(read_state(settings.runs_dir).services, key=lambda record: list(TITLES).index(record.name))
    return [ServiceStatus(record, _health(record, settings)) for record in records]


def _wanted_ports(
    options: ServiceOptions,
    settings: ConfiguredSettings,
    state: ServiceState,
    running: Sequence[ServiceRecord],
    explicit_ports: Mapping[str, int],
    tell: Listener,
) -> dict[str, int]:
    """Return the port of each service that is to be started."""
    recorded = {record.name: int(record.address.rpartition(":")[2]) for record in state.services} if running else {}
    moved = [name for name, port in explicit_ports.items() if recorded.get(name, port) != port]
    if moved:
        raise ConfigError(
            f"The {TITLES[moved[0]]} has port {recorded[moved[0]]} while services run. "
            "Stop them with 'hn-titles down' to give them other ports."
        )
    own = {record.name: record.address for record in state.services}
    elsewhere = {
        name: variable
        for name, (variable, address) in configured_elsewhere(settings).items()
        # The address that `up` itself told is no other place.
        if name not in own or address.removesuffix("/api") != own[name]
    }
    for name, variable in elsewhere.items():
        tell(TITLES[name], f"not started here, as {variable} is set")
    names = {record.name for record in running}
    return {
        name: recorded.get(name, port)
        for name, port in options.ports.items()
        if name not in names and name not in elsewhere
    }


def _start(services: Sequence[Service], state: ServiceState, settings: ConfiguredSettings, tell: Listener) -> None:
    """Start `services` and wait until all are well; stop those that were started where one is not."""
    runs_dir = settings.runs_dir
    before = state.without([service.name for service in services])
    if not services:
        return
    mark = new_mark()
    state = ServiceState(before.services, (*before.marks, mark))
    # Before anything runs: whatever happens to this process, `down` finds the others by the mark.
    write_state(runs_dir, state)
    starting: dict[str, processes.Started] = {}
    unready = list(services)
    deadline = time.monotonic() + _START_TIMEOUT_S
    try:
        while unready:
            for service in list(unready):
                if service.name in starting:
                    if _is_ready(service, settings):
                        unready.remove(service)
                        tell(service.title, f"healthy, {service.address}")
                    else:
                        _check(service, starting[service.name], deadline)
                elif service.after not in {other.name for other in unready}:
                    with _undisturbed():  # between its start and its mark, a process could be overlooked
                        starting[service.name] = processes.start(service, mark)
                    state = state.with_record(starting[service.name].record)
                    write_state(runs_dir, state)
                    tell(service.title, f"starts, log in {service.log}")
            time.sleep(_POLL_S)
        # One that was well may have ended while the others started.
        for service in services:
            _check(service, starting[service.name], deadline)
    except BaseException:
        with _undisturbed():
            processes.stop([record for record in state.services if record.mark == mark], [mark])
            write_state(runs_dir, before if before.services else ServiceState())
        raise


def _check(service: Service, started: processes.Started, deadline: float) -> None:
    code = started.process.poll()
    log = end_of_log(service.log, since=started.log_start)
    if code is not None:
        raise ServiceUnavailable(f"The {service.title} ended with exit code {code} before all were ready.{log}")
    if time.monotonic() > deadline:
        raise ServiceUnavailable(f"The {service.title} was not healthy after {_START_TIMEOUT_S:g} s.{log}")


def _is_ready(service: Service, settings: ConfiguredSettings) -> bool:
    if ask(service.health_url, health_headers(service.name, settings))[0] != 200:
        return False
    if service.ready is None:
        return True
    url, expected = service.ready
    code, text = ask(url, service.ready_headers)
    return code == 200 and expected in text


def _health(record: ServiceRecord, settings: ConfiguredSettings) -> str:
    if not is_running(record):
        return "gone"
    code, text = ask(record.health_url, health_headers(record.name, settings))
    if code is None:
        return text
    return "healthy" if code == 200 else f"HTTP {code}: {text:.100}"


def ask(
    url: str, headers: Mapping[str, str], timeout_s: float = _ASK_TIMEOUT_S, *, proxies: bool = False
) -> tuple[int | None, str]:
    """Return status and text of an answer, or None and what went wrong; `proxies`: go through those of the
    environment."""
    try:
        answer = httpx.get(url, headers=dict(headers), timeout=timeout_s, trust_env=proxies)
        return answer.status_code, answer.text
    except httpx.TimeoutException:
        return None, f"no answer within {timeout_s:g} s"
    except httpx.HTTPError as error:
        return None, f"no answer: {error}"


@contextmanager
def _locked(runs_dir: Path) -> Iterator[None]:
    """Hold the services against any other `up` or `down`; the lock goes with the process, however it ends."""
    folder = services_folder(runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"Another 'hn-titles up' or 'hn-titles down' is at work in {folder}. Wait for it, or end it."
            ) from error
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off interruptions until the end of the block. (Ignored signals would be ignored by what is started, too.)"""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for which in came[:1]:
            signal.raise_signal(which)
