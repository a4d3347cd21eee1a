"""Which services run on this machine: the state file, and whether its processes are still the ones it names."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tasks.titles.errors import DataError

MARK = "HN_TITLES_SERVICE"
"""Environment variable `<mark>:<service>` of each service's processes, inherited by all that they start."""
# A system tells the start of a process to a hundredth of a second, but counts from a clock that is kept adjusting.
_START_TOLERANCE_S = 1.0


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """A service that was started: how to reach it and how to recognise its first process."""

    name: str
    title: str
    address: str
    health_url: str
    pid: int
    started: float
    """Start of the process, in seconds since 1970 as the system tells it; another process of that id has another."""
    log: str
    mark: str
    reward_model: str | None = None
    """What a reward server serves."""

    @property
    def label(self) -> str:
        """The value of `MARK` in the environment of its processes."""
        return service_label(self.mark, self.name)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """All that `up` has started and `down` has not stopped."""

    services: tuple[ServiceRecord, ...] = ()
    marks: tuple[str, ...] = field(default=())
    """One mark for each `up`; written before it starts anything, so that nothing can be lost."""

    def record(self, name: str) -> ServiceRecord | None:
        """Return the record of a service, None where there is none."""
        return next((record for record in self.services if record.name == name), None)

    def with_record(self, new: ServiceRecord) -> ServiceState:
        """Return the state with `new` in the place of any record of that name."""
        kept = tuple(record for record in self.services if record.name != new.name)
        return replace(self, services=(*kept, new))

    def without(self, names: Sequence[str]) -> ServiceState:
        """Return the state without the records of `names`."""
        return replace(self, services=tuple(record for record in self.services if record.name not in names))


def new_mark() -> str:
    """Return a mark that no other `up` has."""
    return uuid.uuid4().hex


def service_label(mark: str, name: str) -> str:
    """Return the value of `MARK` for the processes of service `name` of one `up`."""
    return f"{mark}:{name}"


def services_folder(runs_dir: Path) -> Path:
    """Return the folder of state, logs and embedded databases."""
    return runs_dir / "services"


def read_state(runs_dir: Path) -> ServiceState:
    """Return what the state file says, an empty state where there is none.

    Raises `DataError` where the file cannot be read.
    """
    path = _state_path(runs_dir)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return ServiceState(
            services=tuple(ServiceRecord(**record) for record in values["services"]), marks=tuple(values["marks"])
        )
    except FileNotFoundError:
        return ServiceState()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as the state of the services: {error}. "
            "End them by hand if any still run (their logs lie beside it), then remove the file."
        ) from error


def write_state(runs_dir: Path, state: ServiceState) -> None:
    """Write the state file whole, or remove it where nothing is left."""
    # run_directory reads the settings, which read this module.
    from tasks.titles.run_directory import write_json

    if state.marks:
        write_json(_state_path(runs_dir), asdict(state))
    else:
        _state_path(runs_dir).unlink(missing_ok=True)


def is_running(record: ServiceRecord) -> bool:
    """Whether the process that the record names runs: the same id with another start is another process."""
    import psutil

    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < _START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def services_in_use(runs_dir: Path) -> dict[str, ServiceRecord]:
    """Return the records of all services by name while any of them runs, and none otherwise.

    After a restart of the machine nothing runs, and the file counts for nothing. While others run, a service that has
    died keeps its address: what needs it fails and says so.
    """
    state = read_state(runs_dir)
    if any(is_running(record) for record in state.services):
        return {record.name: record for record in state.services}
    return {}


def _state_path(runs_dir: Path) -> Path:
    return services_folder(runs_dir) / "state.json"
