"""The folder of one run: its profile, its state, its lock, and which folder a command continues.

runs/<run name>/
├── profile.json      the resolved profile
├── run.json          state, MLflow run id, time of creation
├── stories.json      what became of every row of the source
├── metrics.jsonl     every step's metrics, written by the training loop
├── checkpoints …     adapters, in the engine's own layout
├── *.log             what libraries and servers had to say
├── titles.jsonl      every evaluated title with its judgements
└── summary.json      the evaluation's figures
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tasks.titles.config import Profile, override_profile
from tasks.titles.errors import ConfigError, DataError

State = Literal["training", "trained", "evaluated"]
_ORDER: tuple[State, ...] = ("training", "trained", "evaluated")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What run.json holds."""

    name: str
    created: str
    state: State = "training"
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    peak_memory_mb: float | None = None
    """Of training: the highest sum over all processes, in 10⁶ bytes."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run's folder."""

    path: Path
    profile: Profile
    resumed: bool
    """Whether the folder was there before this command."""

    @property
    def name(self) -> str:
        """The run's name, which is the folder's."""
        return self.path.name

    @property
    def summary_path(self) -> Path:
        """Where the evaluation's figures go."""
        return self.path / "summary.json"

    @property
    def report_page(self) -> Path:
        """Where a comparison's report goes."""
        return self.path / "report.html"

    @property
    def log_path(self) -> Path:
        """Where everything that is not for the terminal goes."""
        return self.path / "run.log"

    def record(self) -> RunRecord:
        """Read run.json."""
        return _read_record(self.path)

    def update(self, **changes: Any) -> RunRecord:
        """Change fields of run.json; the file is replaced whole."""
        record = replace(self.record(), **changes)
        write_json(self.path / "run.json", asdict(record))
        return record

    @property
    def trained(self) -> bool:
        """Whether training has come to its last step."""
        return self.record().state != "training"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against any other process; the lock goes with the process, however it ends.

        Raises `ConfigError` where another process holds it.
        """
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise ConfigError(
                    f"Run '{self.name}' is being worked on by process {holder}. Wait for it, or start another run "
                    "with --run-name or --fresh."
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)


def open_run(
    profile: Profile,
    *,
    runs_dir: Path,
    run_name: str | None = None,
    fresh: bool = False,
    until: State = "evaluated",
    may_change: Collection[str] = (),
    stem: str | None = None,
) -> RunDirectory:
    """Return the folder to work in: the one to continue, by the rules of `run_to_continue`, or a new one.

    A new one without a name is `<stem>-<n>`, `stem` being `<profile>-<engine>` where it is not given.

    Raises `ConfigError` as `run_to_continue` does.
    """
    run = run_to_continue(
        profile, runs_dir=runs_dir, run_name=run_name, fresh=fresh, until=until, may_change=may_change
    )
    if run is not None:
        write_json(run.path / "profile.json", profile.model_dump(mode="json"))
        return run
    if run_name is not None:
        path = runs_dir / run_name
        path.mkdir(parents=True, exist_ok=True)
        return _initialise(path, profile)
    runs_dir.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = runs_dir / f"{stem or f'{profile.name}-{profile.engine}'}-{number}"
        try:
            path.mkdir()
            return _initialise(path, profile)
        except FileExistsError:
            number += 1


def run_to_continue(
    profile: Profile,
    *,
    runs_dir: Path,
    run_name: str | None = None,
    fresh: bool = False,
    until: State = "evaluated",
    may_change: Collection[str] = (),
) -> RunDirectory | None:
    """Return the run that a command continues, None where it makes a new one. Changes nothing.

    With `run_name` it is the one of that name; settings of `may_change` may then differ from what it was started
    with. Without it, it is the newest run of the very same profile that has not come to `until`. `fresh` never
    continues.

    Raises `ConfigError` where `run_name` is no folder name, belongs to another profile, or is taken although a fresh
    run was asked for.
    """
    if run_name is None:
        runs = [] if fresh else newest_first(runs_dir)
        ends = _ORDER.index(until)
        return next((one for one in runs if one.profile == profile and _ORDER.index(one.record().state) < ends), None)
    if not _RUN_NAME.fullmatch(run_name):
        raise ConfigError(
            f"A run name is a folder's name of letters, digits, '.', '_' and '-', at most 100, got '{run_name}'."
        )
    path = runs_dir / run_name
    if not (path / "run.json").exists():
        # A process that was killed before it wrote run.json leaves a folder without one.
        there = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        strangers = sorted(set(there) - {"profile.json", ".lock"})
        if strangers:
            raise ConfigError(f"{path} is no run's folder: it holds {strangers[0]}. Give another --run-name.")
        return None
    if fresh:
        raise ConfigError(f"There is a run '{run_name}' already: give another --run-name, or leave out --fresh.")
    _check_same_profile(path, profile, may_change)
    return RunDirectory(path, profile, resumed=True)


def find_run(
    runs_dir: Path, *, run_name: str | None = None, profile_name: str | None = None, overrides: Sequence[str] = ()
) -> RunDirectory:
    """Return an existing run: the one of that name, or the newest (of that profile's name, where given).

    `overrides` apply to the profile that is returned, not to the one in the folder. Raises `DataError`
    where there is no such run.
    """
    runs = newest_first(runs_dir)
    for run in runs:
        if run_name in (None, run.name) and (run_name is not None or profile_name in (None, run.profile.name)):
            return replace(run, profile=override_profile(run.profile, overrides))
    wanted = f"no run '{run_name}'" if run_name else f"no run of profile '{profile_name}'" if profile_name else "no run"
    known = ", ".join(run.name for run in runs) or "none"
    raise DataError(f"There is {wanted} in {runs_dir}. Runs there: {known}. Train one with: hn-titles train")


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file whole, its folder made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole: temporary file, then rename."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8", errors="replace")
    scratch.replace(path)


def _initialise(path: Path, profile: Profile) -> RunDirectory:
    """Write a new run's files; run.json comes last and makes the folder a run."""
    write_json(path / "profile.json", profile.model_dump(mode="json"))
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    write_json(path / "run.json", asdict(RunRecord(path.name, created)))
    return RunDirectory(path, profile, resumed=False)


def _read_record(path: Path) -> RunRecord:
    try:
        values = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return RunRecord(**{name: values[name] for name in RunRecord.__slots__ if name in values})
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path / 'run.json'} cannot be read as a run's record: {error}") from error


def newest_first(runs_dir: Path) -> list[RunDirectory]:
    """Return the runs whose profile this version can read, by time of creation."""
    runs = []
    for file in runs_dir.glob("*/run.json"):
        try:
            profile = Profile.model_validate_json((file.parent / "profile.json").read_text(encoding="utf-8"))
            runs.append((_read_record(file.parent).created, file.parent, profile))
        except (OSError, ValueError, DataError):
            # A run of another version, or a broken one: not one to continue, and its folder stays as it is.
            continue
    runs.sort(key=lambda run: run[0], reverse=True)
    return [RunDirectory(path, profile, resumed=True) for _, path, profile in runs]


def _check_same_profile(path: Path, profile: Profile, may_change: Collection[str]) -> None:
    try:
        saved = json.loads((path / "profile.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'profile.json'} cannot be read: {error}") from error
    wanted = profile.model_dump(mode="json")
    different = [
        f"  {key}: {saved.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*saved, *wanted} - {*may_change})
        if saved.get(key) != wanted.get(key)
    ]
    if different:
        raise ConfigError(
            f"Run '{path.name}' was started with other settings:\n" + "\n".join(different) + "\n"
            "Continue it with the same ones, or give the new run another --run-name."
        )
