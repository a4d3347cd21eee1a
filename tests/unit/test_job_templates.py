"""Work pools for processes, containers and Kubernetes jobs: what their templates hold, and what deploy makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools import is_valid_schema, validate
from prefect.utilities.templating import find_placeholders

from flows.deployment_plan import PoolType, WorkPool, read_plan
from flows.execute import ENVIRONMENT
from flows.job_templates import job_template
from tasks.titles.config import load_profile
from tasks.titles.errors import ConfigError

TYPES: list[PoolType] = ["process", "docker", "kubernetes"]


def pool(name: str, pool_type: PoolType) -> WorkPool:
    return read_plan(load_profile("starter"), "starter", pool_type=pool_type).pool(name)


def template(
    pool_type: PoolType,
    name: str = "gpu",
    present: dict[str, Any] | None = None,
    working_dir: Path | None = None,
    image: str | None = None,
) -> dict[str, Any]:
    return job_template(pool(name, pool_type), present, working_dir=working_dir, image=image)


def defaults(made: dict[str, Any]) -> dict[str, Any]:
    return {name: field["default"] for name, field in made["variables"]["properties"].items() if "default" in field}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("pool_type", TYPES)
def test_a_template_is_whole(name: str, pool_type: PoolType) -> None:
    made = template(pool_type, name)
    used = {placeholder.name for placeholder in find_placeholders(made["job_configuration"])}
    assert used == set(made["variables"]["properties"])
    is_valid_schema(made["variables"], preprocess=False)
    validate(defaults(made), made["variables"], raise_on_error=True, ignore_required=True)
    assert defaults(made)["env"].items() >= {**ENVIRONMENT, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}.items()


@pytest.mark.parametrize(
    ("pool_type", "expected"),
    [
        ("process", {"working_dir": str(Path.cwd())}),
        ("docker", {"image": "hn-titles:gpu", "volumes": [f"{Path.cwd()}:/work"], "shared_memory": "8g"}),
        ("kubernetes", {"image": "hn-titles:gpu", "work_claim": "hn-titles-work", "gpus": 1, "memory_limit": "96Gi"}),
    ],
)
def test_a_new_pool_has_what_prefect_yaml_says(pool_type: PoolType, expected: dict[str, Any]) -> None:
    assert expected.items() <= defaults(template(pool_type)).items()


def test_only_the_gpu_pool_asks_for_gpus() -> None:
    asked = {(kind, name): defaults(template(kind, name))["gpus"] for kind in TYPES[1:] for name in ("cpu", "gpu")}
    assert asked == {
        ("docker", "cpu"): [], ("docker", "gpu"): [{"count": -1, "capabilities": [["gpu"]]}],
        ("kubernetes", "cpu"): 0, ("kubernetes", "gpu"): 1,
    }  # fmt: skip


def test_what_is_given_is_kept_until_it_is_given_anew(tmp_path: Path) -> None:
    first = template("docker", working_dir=tmp_path, image="registry.example.com/hn-titles")
    assert defaults(first)["image"] == "registry.example.com/hn-titles:gpu"
    assert defaults(first)["volumes"] == [f"{tmp_path}:/work"]
    assert template("docker", present=first) == first
    moved = defaults(template("docker", present=first, working_dir=tmp_path / "elsewhere"))
    assert moved["volumes"] == [f"{tmp_path}/elsewhere:/work"] and moved["image"] == defaults(first)["image"]
    claimed = template("kubernetes")
    claimed["variables"]["properties"]["work_claim"]["default"] = "mine"
    assert defaults(template("kubernetes", present=claimed))["work_claim"] == "mine"


@pytest.mark.parametrize("pool_type", TYPES)
def test_a_pool_that_a_worker_has_made_becomes_as_new(pool_type: PoolType) -> None:
    fields = {"image": {"default": None}, "volumes": {"default": []}, "working_dir": {"default": None}, "env": {}}
    foreign = {"job_configuration": {}, "variables": {"type": "object", "properties": fields}}
    assert template(pool_type, present=foreign) == template(pool_type)


@pytest.mark.parametrize(
    ("pool_type", "given", "message"),
    [
        ("process", {"image": "hn-titles"}, "--image is for containers"),
        ("kubernetes", {"working_dir": Path("/srv")}, "volume claim"),
    ],
)
def test_what_a_type_has_no_use_for_is_refused(pool_type: PoolType, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        template(pool_type, **given)


def test_a_setting_that_no_template_has_is_refused() -> None:
    wrong = pool("gpu", "docker").model_copy(update={"jobs": {"docker": {"gpu": 1}}})
    with pytest.raises(ConfigError, match=r"sets \['gpu'\]"):
        job_template(wrong, None, working_dir=None, image=None)
