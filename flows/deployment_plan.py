"""What deployments/prefect.yaml and automations.yaml ask for, checked and fitted to a profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tasks.titles.config import PROFILES_DIR, Profile
from tasks.titles.errors import ConfigError

PREFECT_FILE = PROFILES_DIR.parent / "prefect.yaml"
AUTOMATIONS_FILE = PROFILES_DIR.parent / "automations.yaml"
CPU_POOL = "cpu"
"""Where everything goes with a profile that computes on the CPU."""
PoolType = Literal["process", "docker", "kubernetes"]
"""What a worker makes of a flow run: a process, a container or a Kubernetes job."""
CONTAINER_GRACE_S = 1800
"""How long a run in a container has its slot before it must have started: an image is pulled, a node is started."""
WEBHOOK = "webhook"
"""Stands in an automation's action for the block of the address to tell."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkPool(_Part):
    """Machines of one kind."""

    name: str
    type: PoolType
    at_once: int = Field(ge=1, description="runs of exclusive deployments that work at the same time")
    description: str
    jobs: dict[PoolType, dict[str, Any]] = Field(
        default_factory=dict, description="by the pool's type, what its runs get in place of the template's defaults"
    )

    @property
    def limit_name(self) -> str:
        """Name of the global concurrency limit that the pool's exclusive deployments share."""
        return f"hn-titles-{self.name}"


class ConcurrencyLimit(_Part):
    """How a deployment that must not run beside others of its pool waits for its turn."""

    limit: Literal[1]
    collision_strategy: Literal["ENQUEUE"]
    grace_period_seconds: int = Field(ge=60, le=86_400)


class Schedule(_Part):
    """When a deployment runs by itself."""

    slug: str
    cron: str
    timezone: str
    active: bool

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, value: str) -> str:
        from prefect.client.schemas.schedules import CronSchedule

        CronSchedule(cron=value)
        return value


class PoolName(_Part):
    """The pool of a deployment."""

    name: str


class Deployment(_Part):
    """One entry of the list of deployments."""

    name: str
    entrypoint: str = Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")
    description: str | None = None
    tags: list[str]
    work_pool: PoolName
    concurrency_limit: ConcurrencyLimit | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    fixed: list[str] = Field(default_factory=list, description="parameters whose form offers nothing else")
    schedules: list[Schedule] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fixed_have_values(self) -> Deployment:
        unset = sorted(set(self.fixed) - set(self.parameters))
        if unset:
            raise ValueError(f"deployment {self.name} fixes {unset}, which its parameters do not set")
        return self


class Plan(BaseModel):
    """All that is to be there after `hn-titles deploy`."""

    # The keys that only Prefect's own command reads are passed over.
    model_config = ConfigDict(extra="ignore", frozen=True)

    work_pools: list[WorkPool]
    deployments: list[Deployment]

    def pool(self, name: str) -> WorkPool:
        """Return the pool of that name."""
        return next(pool for pool in self.work_pools if pool.name == name)


def read_plan(
    profile: Profile, profile_name: str, path: Path = PREFECT_FILE, *, pool_type: PoolType | None = None
) -> Plan:
    """Read `path` and fit it to a profile, which becomes the default of every form that offers one.

    With a profile that computes on the CPU all deployments go to the pool `cpu`. `pool_type` takes the place of every
    pool's own. Raises `ConfigError` where the file is not usable.
    """
    try:
        plan = Plan.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path} is not usable: {error}") from error
    unknown = {entry.work_pool.name for entry in plan.deployments} - {pool.name for pool in plan.work_pools}
    if unknown:
        raise ConfigError(f"{path} has deployments for the work pools {sorted(unknown)}, which it does not define.")
    pools = [pool.model_copy(update={"type": pool_type or pool.type}) for pool in plan.work_pools]
    types = {pool.name: pool.type for pool in pools}
    fitted = [_fitted(entry, profile, profile_name) for entry in plan.deployments]
    deployments = [_with_grace(entry, types[entry.work_pool.name]) for entry in fitted]
    return plan.model_copy(update={"work_pools": pools, "deployments": deployments})


def read_automations(path: Path = AUTOMATIONS_FILE) -> list[dict[str, Any]]:
    """Return the automations as Prefect's API takes them, `WEBHOOK` standing for a block of that kind."""
    return list(_read_yaml(path)["automations"])


def wants_webhook(automation: Mapping[str, Any]) -> bool:
    """Return whether an automation has somebody told."""
    return any(action.get("block_document_id") == WEBHOOK for action in automation["actions"])


def with_webhook(automation: Mapping[str, Any], block_id: str) -> dict[str, Any]:
    """Return an automation that uses the block of that id."""
    actions = [
        {**action, "block_document_id": block_id} if action.get("block_document_id") == WEBHOOK else action
        for action in automation["actions"]
    ]
    return {**automation, "actions": actions}


def _fitted(entry: Deployment, profile: Profile, profile_name: str) -> Deployment:
    changes: dict[str, Any] = {}
    if "profile" in entry.parameters:
        changes["parameters"] = {**entry.parameters, "profile": profile_name}
    if profile.device == "cpu":
        changes["work_pool"] = PoolName(name=CPU_POOL)
        changes["tags"] = list(dict.fromkeys(CPU_POOL if tag == "gpu" else tag for tag in entry.tags))
    return entry.model_copy(update=changes)


def _with_grace(entry: Deployment, pool_type: PoolType) -> Deployment:
    if pool_type == "process" or entry.concurrency_limit is None:
        return entry
    limit = entry.concurrency_limit.model_copy(update={"grace_period_seconds": CONTAINER_GRACE_S})
    return entry.model_copy(update={"concurrency_limit": limit})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
