"""The processes of services: started in sessions of their own, found again by their mark, and ended to the last."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.services.plan import Service
from tasks.services.state import MARK, ServiceRecord, is_running, service_label

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""Time between SIGTERM and SIGKILL: a flow run stops its children and tells Prefect how it ended."""
_KILL_WAIT_S = 10.0
# For a worker to tell Prefect of flow runs that could not do so themselves.
_REPORT_S = 2.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Started:
    """A service that was just started."""

    record: ServiceRecord
    process: subprocess.Popen[bytes]
    log_start: int
    """Where in its log, which it shares with its predecessors, its own part begins."""


def start(service: Service, mark: str) -> Started:
    """Start a service in a session of its own, so that it outlives this process and its terminal.

    Its output is appended to its log. Raises `OSError` where the log's folder cannot be used.
    """
    import psutil

    environment = {**os.environ, **service.environment, MARK: service_label(mark, service.name)}
    service.log.parent.mkdir(parents=True, exist_ok=True)
    with service.log.open("ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            list(service.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in environment.items() if value is not None},
            start_new_session=True,
        )
    # Until this process has waited for it, its id belongs to no other.
    started = psutil.Process(process.pid).create_time()
    record = ServiceRecord(
        service.name,
        service.title,
        service.address,
        service.health_url,
        process.pid,
        started,
        str(service.log),
        mark,
        service.reward_model,
    )
    logger.info(
        "The %s starts as process %d on %s, log in %s", service.title, process.pid, service.address, service.log
    )
    return Started(record, process, log_start)


def stop(records: Sequence[ServiceRecord], marks: Sequence[str], tell: Callable[[str], None] = lambda _: None) -> int:
    """End the services of `records` and whatever else carries one of `marks`; return how many processes ended.

    The worker goes first: what its flow runs have to say at their end needs the other services. `tell` hears the
    title of each service before its turn.

    A process is ended for its mark in the environment, which all descendants inherit, or as a member of the group of a
    first process whose id and start are the record's. An id that another process has by now is left alone.
    """
    ended = 0
    for record in sorted(records, key=lambda record: record.name != "worker"):
        tell(record.title)
        ended += _end_flow_runs(record)
        ended += _end(lambda record=record: _processes_of(record))  # type: ignore[misc]
    return ended + _end(lambda: _marked(tuple(f"{mark}:" for mark in marks)))


def survivors(records: Sequence[ServiceRecord], marks: Sequence[str]) -> list[int]:
    """Return the ids of all processes that `stop` would end."""
    found = {process.pid for record in records for process in _processes_of(record)}
    return sorted(found | {process.pid for process in _marked(tuple(f"{mark}:" for mark in marks))})


def _end_flow_runs(worker: ServiceRecord) -> int:
    """End what a worker runs while the worker lives.

    Its flow runs, each in a session of its own, then tell Prefect that they crashed, or the worker does. A worker that
    ends first kills them without a word, and Prefect shows them running.
    """
    if worker.name != "worker" or not is_running(worker):
        return 0
    ended = _end(lambda: [process for process in _processes_of(worker) if process.pid != worker.pid])
    if ended:
        time.sleep(_REPORT_S)
    return ended


def _end(find: Callable[[], list[psutil.Process]]) -> int:
    import psutil

    ended: set[int] = set()
    told: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline + _KILL_WAIT_S:
        # Looked for anew each time: a process may start another one until it ends.
        left = find()
        if not left:
            return len(ended)
        for process in left:
            ended.add(process.pid)
            late = time.monotonic() > deadline
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil itself never signals an id that was reused
                if late:
                    process.kill()
                elif process.pid not in told:
                    told.add(process.pid)
                    process.terminate()
        psutil.wait_procs(left, timeout=_POLL_S)
    logger.warning("Processes %s did not end", ", ".join(str(process.pid) for process in find()))
    return len(ended)


def _processes_of(record: ServiceRecord) -> list[psutil.Process]:
    import psutil

    found = _marked((record.label,))
    if is_running(record):
        known = {process.pid for process in found}
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if process.pid not in known and os.getpgid(process.pid) == record.pid and _lives(process):
                    found.append(process)
    return found


def _marked(labels: tuple[str, ...]) -> list[psutil.Process]:
    """Return the living processes whose label begins with one of `labels`."""
    import psutil

    found = []
    for process in psutil.process_iter():
        # Other users' processes cannot be read, and are not ours.
        with contextlib.suppress(OSError, psutil.Error):
            label = process.environ().get(MARK, "")
            if label and label.startswith(labels) and process.pid != os.getpid() and _lives(process):
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    import psutil

    return process.status() != psutil.STATUS_ZOMBIE
