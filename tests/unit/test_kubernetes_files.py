"""The cluster's services as files: every name in them is another one's, and their programs take their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow.cli
import pytest
import yaml

from flows.deployment_plan import PREFECT_FILE, read_plan
from flows.job_templates import TEMPLATES_DIR, job_template
from reward_server.settings import read_settings
from tasks.titles.config import ConfiguredSettings, load_profile

FILES = sorted((PREFECT_FILE.parent / "kubernetes").glob("*.yaml"))
OBJECTS: list[dict[str, Any]] = [one for path in FILES for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
PLAN = read_plan(load_profile("starter"), "starter", pool_type="kubernetes")


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in OBJECTS if one["kind"] == kind}


def job_spec() -> dict[str, Any]:
    template = job_template(PLAN.pool("cpu"), None, working_dir=None, image=None)
    return dict(template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"])


PODS = {name: one["spec"]["template"]["spec"] for name, one in named("Deployment").items()} | {"job": job_spec()}


def container(name: str) -> dict[str, Any]:
    (only,) = PODS[name]["containers"]
    return dict(only)


def test_everything_is_in_one_namespace() -> None:
    own = {one["metadata"].get("namespace", one["metadata"]["name"]) for one in OBJECTS}
    assert own == {"hn-titles"} == set(named("Namespace"))


@pytest.mark.parametrize("name", PODS)
def test_pods_are_unprivileged_and_get_no_service_links(name: str) -> None:
    spec = PODS[name]
    assert spec["enableServiceLinks"] is False, "REWARD_SERVER_PORT=tcp://… would be taken for a reward server's port"
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", named("Service"))
def test_a_service_finds_its_pods_and_port(name: str) -> None:
    service, deployment = named("Service")[name]["spec"], named("Deployment")[name]["spec"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    (port,) = service["ports"]
    ports = {one["name"]: one["containerPort"] for one in container(name)["ports"]}
    assert ports[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("name", PODS)
def test_what_a_pod_mounts_and_reads_is_there(name: str) -> None:
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in PODS[name].get("volumes", ())
              if "persistentVolumeClaim" in volume}  # fmt: skip
    assert claims <= {*named("PersistentVolumeClaim"), "{{ work_claim }}"}
    maps = {source["configMapRef"]["name"] for source in container(name).get("envFrom", ()) if "configMapRef" in source}
    assert maps <= set(named("ConfigMap"))
    assert PODS[name].get("serviceAccountName", "prefect-worker") in named("ServiceAccount")


def test_the_jobs_claim_and_namespace_are_the_services() -> None:
    template = job_template(PLAN.pool("cpu"), None, working_dir=None, image=None)
    fields = template["variables"]["properties"]
    assert fields["work_claim"]["default"] in named("PersistentVolumeClaim")
    assert fields["namespace"]["default"] in named("Namespace")


def test_flow_runs_are_told_the_services_addresses() -> None:
    told = named("ConfigMap")["hn-titles"]["data"]
    assert set(told) <= {name.upper() for name in ConfiguredSettings.model_fields}
    assert {address.hostname for address in map(urlsplit, told.values())} <= set(named("Service"))
    for address in map(urlsplit, told.values()):
        assert address.port == named("Service")[str(address.hostname)]["spec"]["ports"][0]["port"]


def test_there_is_a_worker_for_each_pool() -> None:
    arguments = [one["args"] for one in map(container, PODS) if one["args"][:2] == ["prefect", "worker"]]
    assert {line[line.index("--pool") + 1] for line in arguments} == {pool.name for pool in PLAN.work_pools}
    assert {line[line.index("--type") + 1] for line in arguments} == {"kubernetes"}


def test_every_image_is_one_that_the_dockerfile_builds() -> None:
    lines = Path(TEMPLATES_DIR.parent / "Dockerfile").read_text(encoding="utf-8").splitlines()
    targets = {line.split()[-1] for line in lines if line.startswith("FROM")}
    images = {one["image"] for one in map(container, PODS)} - {"{{ image }}"}
    images |= {jobs["image"] for pool in PLAN.work_pools for jobs in pool.jobs.values()}
    assert images == {"hn-titles:cpu", "hn-titles:gpu"}
    assert {image.partition(":")[2] for image in images} <= targets


def test_the_reward_server_takes_its_arguments() -> None:
    program, arguments = container("reward-server")["args"][:3], container("reward-server")["args"][3:]
    assert program == ["python", "-m", "reward_server"]
    settings = read_settings(arguments)
    assert (settings.host, settings.port, settings.threads) == ("0.0.0.0", 7000, 2)


def test_mlflow_takes_its_arguments() -> None:
    program, *arguments = container("mlflow")["args"][1:]
    assert program == "server"
    context = mlflow.cli.server.make_context("mlflow server", arguments)
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", 5000)
