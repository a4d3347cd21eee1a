"""What this machine is and has: processor, memory, disks, GPUs, packages, ports, and which services answer."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.services import launcher
from tasks.services.environments import Environment, environments
from tasks.services.gpus import Gpus, find_gpus
from tasks.services.plan import TITLES, ServiceOptions, configured_elsewhere, health_headers
from tasks.services.ports import holder
from tasks.titles.config import ConfiguredSettings
from tasks.titles.hub_files import hub_cache

TIMEOUT_S = 3.0
HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that files go to."""

    title: str
    path: str
    free_bytes: int
    writable: bool


@dataclass(frozen=True, slots=True)
class Port:
    """A port that `hn-titles up` wants."""

    service: str
    number: int
    held_by: str | None
    """None where it is free."""
    own: bool = False
    """Whether a service of `hn-titles up` holds it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A service and what it said."""

    service: str
    address: str | None
    state: str
    """`healthy`, `not started`, or what is wrong."""

    @property
    def well(self) -> bool:
        """Whether it can be used."""
        return self.state == "healthy"


@dataclass(frozen=True, slots=True)
class Machine:
    """All of it, at one moment."""

    system: str
    python: str
    cores: int
    memory_bytes: int
    available_bytes: int
    gpus: Gpus
    environments: tuple[Environment, ...]
    places: tuple[Place, ...]
    ports: tuple[Port, ...]
    answers: tuple[Answer, ...]

    def environment(self, extra: str) -> Environment:
        """Return the environment of that extra."""
        return next(one for one in self.environments if one.extra == extra)

    def place(self, title: str) -> Place:
        """Return the place of that title."""
        return next(one for one in self.places if one.title == title)

    def answer(self, service: str) -> Answer:
        """Return what a service said."""
        return next(one for one in self.answers if one.service == service)


def look_around(settings: ConfiguredSettings, options: ServiceOptions) -> Machine:
    """Return what is found; nothing is started or written, and what does not answer costs a few seconds."""
    import psutil

    memory = psutil.virtual_memory()
    started = {one.record.name: one for one in launcher.status(settings)}
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=usable_cores(),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        gpus=find_gpus(),
        environments=tuple(environments(Path.cwd(), settings.trl_python)),
        places=tuple(places(settings.runs_dir)),
        ports=tuple(_ports(started.values(), options)),
        answers=tuple(_answers(started, settings)),
    )


def usable_cores() -> int:
    """Return the cores that this process may compute on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def places(runs_dir: Path) -> list[Place]:
    """Return the folders that a run writes to."""
    return [_place("runs", runs_dir.resolve()), _place("hub cache", hub_cache())]


def _place(title: str, path: Path) -> Place:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return Place(title, str(path), shutil.disk_usage(there).free, os.access(there, os.W_OK))


def _ports(started: Iterable[launcher.ServiceStatus], options: ServiceOptions) -> list[Port]:
    running = {one.record.address: one.record.title for one in started if one.health != "gone"}
    own = {int(address.rpartition(":")[2]): title for address, title in running.items()}
    found = []
    for name, number in options.ports.items():
        if number in own:
            found.append(Port(name, number, f"{own[number]} of hn-titles up", own=True))
        elif number:
            found.append(Port(name, number, _held(options.host, number)))
    return found


def _held(host: str, number: int) -> str | None:
    try:
        family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, number), family=family):
            return None
    except OSError as error:
        return holder(number).removeprefix(" by ") or f"another program ({error.strerror or error})"


def _answers(started: Mapping[str, launcher.ServiceStatus], settings: ConfiguredSettings) -> list[Answer]:
    elsewhere = configured_elsewhere(settings)
    found = []
    for name in ("prefect", "mlflow", "reward"):
        if name in elsewhere:
            _, address = elsewhere[name]
            found.append(Answer(name, address, _state(name, address, settings)))
        elif name in started:
            found.append(Answer(name, started[name].record.address, started[name].health))
        else:
            found.append(Answer(name, None, "not started"))
    hub = (settings.hf_endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    found.append(Answer("hub", hub, _asked(hub, {}, proxies=True)))
    return found


def _state(name: str, address: str, settings: ConfiguredSettings) -> str:
    # Another scheme is a database, or vLLM, which this project's own health question is not for.
    if not address.startswith("http"):
        return "healthy" if name == "mlflow" else "not asked"
    return _asked(f"{address.rstrip('/')}/health", health_headers(name, settings))


def _asked(url: str, headers: dict[str, str], *, proxies: bool = False) -> str:
    code, text = launcher.ask(url, headers, TIMEOUT_S, proxies=proxies)
    if code is None:
        return text
    return "healthy" if code < 400 else f"HTTP {code}"


TITLE_OF = {**TITLES, "hub": "Hugging Face hub"}
"""What a person calls each service."""
