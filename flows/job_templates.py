"""The work pools' job templates: how a worker of each type starts a flow run, and where.

What differs from one installation to the next (a folder, an image's name, a volume claim) is kept from the pool that
is there, unless it is given anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.deployment_plan import PREFECT_FILE, PoolType, WorkPool
from flows.execute import ENVIRONMENT
from tasks.titles.errors import ConfigError

TEMPLATES_DIR = PREFECT_FILE.parent / "work_pools"
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
"""What a run that died is told by; 30 seconds is the shortest that Prefect sends."""
WORK = "/work"
"""Where containers have the folder of runs/ and .env."""
_KEPT: dict[PoolType, tuple[str, ...]] = {
    "process": ("working_dir",),
    "docker": ("image", "volumes"),
    "kubernetes": ("image", "namespace", "work_claim"),
}


def job_template(
    pool: WorkPool, present: Mapping[str, Any] | None, *, working_dir: Path | None, image: str | None
) -> dict[str, Any]:
    """Return the template of a pool's type with the environment that flows expect and the place they work in.

    `present` is the template of the pool that is there. `working_dir` is a folder of the workers' machines: a process
    works in it, a container has it at /work. `image` is an image's name without its tag, which is the pool's name.

    Raises `ConfigError` where the type has no use for what is given.
    """
    template = _of_type(pool.type)
    properties = template["variables"]["properties"]
    defaults = {**pool.jobs.get(pool.type, {}), "env": {**ENVIRONMENT, **HEARTBEAT}}
    unknown = sorted(set(defaults) - set(properties))
    if unknown:
        raise ConfigError(f"Work pool {pool.name} sets {unknown}. Expected: {', '.join(properties)}.")
    first = _given(pool, working_dir=None if pool.type == "kubernetes" else Path.cwd(), image=None)
    fields = present["variables"]["properties"] if present else {}
    kept = {name: fields[name].get("default") for name in _KEPT[pool.type] if name in fields}
    given = {
        **first,
        # A pool that a worker has made has nothing of this.
        **{name: value for name, value in kept.items() if value},
        **_given(pool, working_dir=working_dir, image=image),
    }
    for name, value in {**defaults, **given}.items():
        properties[name]["default"] = value
    return template


def _of_type(pool_type: PoolType) -> dict[str, Any]:
    if pool_type == "process":
        from prefect.workers.process import ProcessWorker

        # A copy of its own at each call.
        return ProcessWorker.get_default_base_job_template()
    return dict(json.loads((TEMPLATES_DIR / f"{pool_type}.json").read_text(encoding="utf-8")))


def _given(pool: WorkPool, *, working_dir: Path | None, image: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if working_dir is not None:
        if pool.type == "kubernetes":
            raise ConfigError("--working-dir is a folder of the workers' machines; Kubernetes has the volume claim.")
        given |= {"working_dir": str(working_dir)} if pool.type == "process" else {"volumes": [f"{working_dir}:{WORK}"]}
    if image is not None:
        if pool.type == "process":
            raise ConfigError("--image is for containers. Expected with it: --pool-type docker or kubernetes.")
        given["image"] = f"{image}:{pool.name}"
    return given
