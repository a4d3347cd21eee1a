"""The files for containers before their own validators: hadolint, Kubernetes' schemas, and the workers' own code.

`make test-containers` brings these packages along; without them each test is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from docker.models.containers import _create_container_args
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.base import BaseJobConfiguration

from flows.deployment_plan import PREFECT_FILE, PoolType, read_plan
from flows.job_templates import job_template
from tasks.titles.config import load_profile

HOME = PREFECT_FILE.parent
KUBERNETES = "1.37"
OBJECTS = [
    pytest.param(one, id=f"{one['kind']}-{one['metadata']['name']}")
    for path in sorted((HOME / "kubernetes").glob("*.yaml"))
    for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]


def module(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-containers")


async def prepared(pool_type: PoolType, pool_name: str, configuration: type[BaseJobConfiguration]) -> Any:
    """Return what a worker starts for a flow run with our template."""
    pool = read_plan(load_profile("starter"), "starter", pool_type=pool_type).pool(pool_name)
    template = job_template(pool, None, working_dir=None, image=None)
    with temporary_settings({PREFECT_API_URL: "http://prefect-server:4200/api"}):
        made = await configuration.from_template_and_values(template, {})
        made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="train-art"))
    return made


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    places = (sysconfig.get_path("scripts"), os.environ["PATH"])
    program = shutil.which("hadolint", path=os.pathsep.join(places))
    if program is None:
        pytest.skip("hadolint is not installed: make test-containers")
    done = subprocess.run([program, HOME / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("found", OBJECTS)
def test_kubernetes_knows_every_field(found: dict[str, Any]) -> None:
    module("kubernetes_validate").validate(found, KUBERNETES, strict=True)


def test_a_wrong_field_would_be_seen() -> None:
    package = module("kubernetes_validate")
    wrong = deepcopy(OBJECTS[0].values[0])
    wrong["metadata"]["nickname"] = "titles"
    with pytest.raises(package.ValidationError):
        package.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize(("pool_name", "gpus"), [("cpu", 0), ("gpu", 1)])
async def test_prefects_kubernetes_worker_makes_a_job_that_kubernetes_knows(pool_name: str, gpus: int) -> None:
    worker = module("prefect_kubernetes.worker")
    job = (await prepared("kubernetes", pool_name, worker.KubernetesWorkerJobConfiguration)).job_manifest
    spec = job["spec"]["template"]["spec"]
    # Prefect asks for these two in a place where Kubernetes passes over them.
    assert (spec.pop("parallelism"), spec.pop("completions")) == (1, 1)
    module("kubernetes_validate").validate(job, KUBERNETES, strict=True)
    (container,) = spec["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["PREFECT_API_URL"] == "http://prefect-server:4200/api"
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule", "an evicted run is started again"
    assert container["args"][:2] == ["prefect", "flow-run"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert container["image"] == f"hn-titles:{pool_name}"


@pytest.mark.parametrize(("pool_name", "gpus"), [("cpu", []), ("gpu", [[["gpu"]]])])
async def test_prefects_docker_worker_makes_a_container_that_docker_knows(pool_name: str, gpus: list[Any]) -> None:
    worker = module("prefect_docker.worker")
    made = await prepared("docker", pool_name, worker.DockerWorkerJobConfiguration)
    # The client would tell the engine's version where the server is on this machine; here it is not.
    settings = worker.DockerWorker(work_pool_name=pool_name)._build_container_settings(None, made)
    asked = _create_container_args({"version": "1.44", **settings})
    host = asked["host_config"]
    assert asked["image"] == f"hn-titles:{pool_name}" and asked["command"].startswith("prefect flow-run")
    assert host["Binds"] == [f"{Path.cwd()}:/work"]
    assert [request["Capabilities"] for request in host["DeviceRequests"]] == gpus
    assert host["ShmSize"] == (2**33 if pool_name == "gpu" else 2**30)
