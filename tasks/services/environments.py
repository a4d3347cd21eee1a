"""The Python environments of the engines: which packages each one needs, and which it has.

What is needed is what pyproject.toml says: the project's own dependencies with those of an extra, or a group, which
stands alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "hn-titles"
EXTRAS = {"cpu": "both engines on a CPU", "gpu-art": "ART on a GPU", "gpu-trl": "TRL on a GPU, and vLLM for both"}
"""The environments by the name of their extra or group."""
GROUPS = ("gpu-trl",)
FOLDERS = {"cpu": ".venv", "gpu-art": ".venv-gpu-art", "gpu-trl": ".venv-gpu-trl"}
"""Where `make` puts each of them."""
MARKS = {"gpu-art": "unsloth", "gpu-trl": "vllm"}
"""The package by which a Python is known as the environment of an extra."""
COMMANDS = {"cpu": "make .venv/.run-ready", "gpu-art": "make gpu-art", "gpu-trl": "make gpu-trl"}


@dataclass(frozen=True, slots=True)
class Package:
    """One package that an environment needs."""

    name: str
    wanted: str
    """The versions that will do, as pip writes them; empty: any."""
    found: str | None

    @property
    def state(self) -> str:
        """`installed`, `wrong` or `missing`."""
        if self.found is None:
            return "missing"
        return "installed" if Requirement(self.name + self.wanted).specifier.contains(self.found, True) else "wrong"


@dataclass(frozen=True, slots=True)
class Environment:
    """One engine's environment as it is on this machine."""

    extra: str
    place: str | None
    """The folder, or `this Python`; None where there is none."""
    packages: tuple[Package, ...]

    @property
    def amiss(self) -> tuple[Package, ...]:
        """The packages that are missing or of a wrong version."""
        return tuple(package for package in self.packages if package.state != "installed")

    @property
    def usable(self) -> bool:
        """Whether it is there and has all that it needs."""
        return self.place is not None and not self.amiss


def requirements(extra: str) -> list[Requirement]:
    """Return what the environment of `extra` needs, each package once, its bounds joined.

    They come from pyproject.toml where the project is worked on, and from the installed package's metadata else, which
    knows no groups.
    """
    file = ROOT / "pyproject.toml"
    lines: Iterable[str]
    if file.is_file():
        wanted = tomllib.loads(file.read_text(encoding="utf-8"))
        project, groups = wanted["project"], wanted["dependency-groups"]
        lines = groups.get(extra) or [*project["dependencies"], *project["optional-dependencies"][extra]]
    else:
        lines = [] if extra in GROUPS else metadata.requires(DISTRIBUTION) or []
    found = [Requirement(line) for line in lines]
    joined: dict[str, Requirement] = {}
    for requirement in found:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        known = joined.setdefault(_key(requirement.name), requirement)
        if known is not requirement:
            known.specifier &= requirement.specifier
    return list(joined.values())


def look_at(extra: str, site_packages: Path | None, place: str | None) -> Environment:
    """Return the environment of `extra` whose packages lie in `site_packages`; None: those of this Python."""
    if place is None:
        installed: dict[str, str] = {}
    elif site_packages is None:
        installed = _versions(metadata.distributions())
    else:
        installed = _versions(metadata.distributions(path=[str(site_packages)]))
    packages = tuple(
        Package(requirement.name, str(requirement.specifier), installed.get(_key(requirement.name)))
        for requirement in requirements(extra)
    )
    return Environment(extra, place, packages)


def environments(folder: Path, trl_python: Path | None = None) -> list[Environment]:
    """Return the engines' environments: this Python where it is the one, else what lies in `folder`.

    `trl_python` is the settings' Python of TRL's trainer.
    """
    found = [look_at("cpu", None, "this Python")]
    for extra, mark in MARKS.items():
        given = trl_python if extra == "gpu-trl" else None
        if given is None and _has(mark):
            found.append(look_at(extra, None, "this Python"))
            continue
        home = given.parent.parent if given else folder / FOLDERS[extra]
        inside = next(iter(sorted(home.glob("lib/python3*/site-packages"))), None)
        found.append(look_at(extra, inside, str(home) if inside else None))
    return found


def _versions(distributions: Iterable[metadata.Distribution]) -> dict[str, str]:
    # The first of a name is the one that is imported.
    versions: dict[str, str] = {}
    for distribution in distributions:
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(_key(name), distribution.version)
    return versions


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _key(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
