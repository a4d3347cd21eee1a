"""What deployments/ asks for: every flow is there and takes its parameters, and what costs money is paused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.utilities.schema_tools.validation import ValidationError

from flows.deployment_plan import (
    AUTOMATIONS_FILE,
    PREFECT_FILE,
    Deployment,
    PoolType,
    read_automations,
    read_plan,
    wants_webhook,
    with_webhook,
)
from flows.form import form_schema
from tasks.titles.config import load_profile, profile_names
from tasks.titles.errors import ConfigError

ON_A_GPU = read_plan(load_profile("qwen-0.5b"), "qwen-0.5b")
ON_A_CPU = read_plan(load_profile("starter"), "starter")
NAMES = ["prepare-data", "train-reward-model", "train-art", "train-trl", "evaluate", "compare", "nightly"]
BLOCK = "b2d0b8a4-5f3a-4a0e-8f6e-0d6a4a1b3f11"


def flow_of(entry: Deployment) -> Flow[..., Any]:
    return load_flow_from_entrypoint(entry.entrypoint, use_placeholder_flow=False)


def deployment(name: str) -> Deployment:
    return next(entry for entry in ON_A_GPU.deployments if entry.name == name)


def schema_of(name: str) -> dict[str, Any]:
    """Return the schema of a deployment's form."""
    entry = deployment(name)
    fixed = {field: entry.parameters[field] for field in entry.fixed}
    return form_schema(parameter_schema(flow_of(entry)).model_dump(mode="json"), fixed)


def test_prefect_reads_the_same_deployments() -> None:
    read = PrefectYamlModel.model_validate(yaml.safe_load(PREFECT_FILE.read_text()))
    assert [entry.name for entry in read.deployments] == NAMES == [entry.name for entry in ON_A_GPU.deployments]
    assert [entry.entrypoint for entry in read.deployments] == [entry.entrypoint for entry in ON_A_GPU.deployments]


@pytest.mark.parametrize("entry", ON_A_GPU.deployments, ids=lambda entry: entry.name)
def test_its_flow_takes_its_parameters(entry: Deployment) -> None:
    flow = flow_of(entry)
    validate(
        entry.parameters,
        parameter_schema(flow).model_dump(mode="json"),
        raise_on_error=True,
        ignore_required=True,
        preprocess=False,
    )
    flow.validate_parameters(entry.parameters)
    assert entry.description or flow.description


@pytest.mark.parametrize("entry", ON_A_GPU.deployments, ids=lambda entry: entry.name)
def test_every_field_of_its_form_is_described_and_has_a_place(entry: Deployment) -> None:
    fields = schema_of(entry.name)["properties"]
    assert fields and all(field["title"] == name and field["description"] for name, field in fields.items()), fields
    places = {field["position"]: name for name, field in fields.items()}
    assert len(places) == len(fields)
    assert places[min(places)] in {"profile", "run_name"} and places[max(places)] == "overrides"


@pytest.mark.parametrize("entry", ON_A_GPU.deployments, ids=lambda entry: entry.name)
def test_nothing_that_costs_money_starts_by_itself(entry: Deployment) -> None:
    assert all(CronSchedule(cron=schedule.cron, timezone=schedule.timezone) for schedule in entry.schedules)
    exclusive = entry.concurrency_limit is not None
    assert exclusive == (entry.work_pool.name == "gpu") == ("gpu" in entry.tags), entry
    assert not (exclusive and any(schedule.active for schedule in entry.schedules))


def test_what_is_exclusive_is_everything_but_the_data() -> None:
    assert [entry.name for entry in ON_A_GPU.deployments if entry.concurrency_limit] == NAMES[1:]
    assert {entry.name for entry in ON_A_GPU.deployments if entry.schedules} == {
        "prepare-data", "train-reward-model", "compare", "nightly",
    }  # fmt: skip


def test_a_profile_on_the_cpu_takes_everything_to_the_cpu_pool() -> None:
    assert {entry.work_pool.name for entry in ON_A_CPU.deployments} == {"cpu"}
    assert all("gpu" not in entry.tags and entry.tags.count("cpu") == 1 for entry in ON_A_CPU.deployments)
    profiles = {entry.parameters.get("profile") for entry in ON_A_GPU.deployments if entry.name != "evaluate"}
    assert profiles == {"qwen-0.5b"}


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("train-art", "profile", {"enum": profile_names(), "type": "string"}),
        ("train-art", "engine", {"enum": ["art"], "default": "art", "type": "string"}),
        ("train-trl", "engine", {"enum": ["trl"], "default": "trl", "type": "string"}),
        ("nightly", "engine", {"enum": ["art", "trl"], "type": "string"}),
        ("train-art", "max_steps", {"minimum": 1, "maximum": 100_000, "type": "integer"}),
        ("train-art", "learning_rate", {"exclusiveMinimum": 0, "maximum": 0.1, "type": "number"}),
        ("train-art", "group_size", {"minimum": 2, "maximum": 64, "type": "integer"}),
        ("train-trl", "seed", {"minimum": 0, "maximum": 2**32 - 1, "type": "integer"}),
        ("train-art", "fresh", {"type": "boolean", "default": False}),
        ("compare", "seeds", {"minItems": 1, "maxItems": 20, "type": "array"}),
        ("train-reward-model", "train_until", {"format": "date", "type": "string"}),
        ("evaluate", "test_stories", {"minimum": 1, "maximum": 100_000, "type": "integer"}),
        ("prepare-data", "minimum_score", {"minimum": 0, "maximum": 10_000, "type": "integer"}),
    ],
)  # fmt: skip
def test_forms_have_choices_and_ranges(name: str, field: str, expected: dict[str, Any]) -> None:
    found = schema_of(name)["properties"][field]
    (offered,) = [one for one in found.get("anyOf", [found]) if one["type"] != "null"]
    assert expected.items() <= offered.items(), offered


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("train-art", {"profile": "nope"}),
        ("train-art", {"max_steps": 0}),
        ("train-art", {"engine": "trl"}),
        ("nightly", {"engine": "ppo"}),
        ("train-art", {"overrides": ["max_steps"]}),
        ("train-art", {"run_name": "../x"}),
        ("compare", {"seeds": []}),
        ("nightly", {"group_size": 1}),
    ],
)
def test_forms_refuse_what_cannot_work(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        validate(parameters, schema_of(name), raise_on_error=True, ignore_required=True)


@pytest.mark.parametrize("entry", ON_A_GPU.deployments, ids=lambda entry: entry.name)
def test_every_field_may_be_left_empty_or_null(entry: Deployment) -> None:
    schema = schema_of(entry.name)
    may_be_null = [name for name, field in schema["properties"].items() if "default" not in field]
    assert may_be_null
    for parameters in (entry.parameters, {**entry.parameters, **dict.fromkeys(may_be_null)}):
        validate(parameters, schema, raise_on_error=True)


@pytest.mark.parametrize(("pool_type", "seconds"), [(None, 180), ("docker", 1800), ("kubernetes", 1800)])
def test_a_run_in_a_container_has_longer_to_start(pool_type: PoolType | None, seconds: int) -> None:
    plan = read_plan(load_profile("qwen-0.5b"), "qwen-0.5b", pool_type=pool_type)
    assert {pool.type for pool in plan.work_pools} == {pool_type or "process"}
    limits = [entry.concurrency_limit for entry in plan.deployments]
    assert {limit.grace_period_seconds for limit in limits if limit} == {seconds}
    assert limits[0] is None


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    text = PREFECT_FILE.read_text()
    broken = tmp_path / "prefect.yaml"
    for change, message in [
        (("30 1 * * *", "30 25 * * *"), "Invalid cron"),
        (("work_pool: {name: cpu}", "work_pool: {name: tpu}"), r"work pools \['tpu'\]"),
        (("at_once: 1", "at_most: 1"), "at_most"),
        (("limit: 1", "limit: [1"), "cannot be read"),
        (("fixed: [engine]", "fixed: [seed]"), r"fixes \['seed'\]"),
    ]:
        broken.write_text(text.replace(*change, 1))
        with pytest.raises(ConfigError, match=message):
            read_plan(load_profile("starter"), "starter", broken)


def test_the_nights_last_step_is_there() -> None:
    from flows.promote import promote_run  # flows.nightly imports it when it is needed

    assert isinstance(promote_run, Flow)
    promote_run.validate_parameters({"run_name": "nightly"})


def test_automations_are_what_prefect_takes() -> None:
    found = [with_webhook(automation, BLOCK) for automation in read_automations()]
    assert [AutomationCore.model_validate(automation).name for automation in found] == [
        "hn-titles run died", "hn-titles run never started", "hn-titles run failed", "hn-titles run stuck",
    ]  # fmt: skip
    assert [wants_webhook(automation) for automation in read_automations()] == [False, False, True, True]


def test_automations_watch_every_flow_that_is_deployed() -> None:
    watched = set(yaml.safe_load(AUTOMATIONS_FILE.read_text())["definitions"]["of_our_flows"]["prefect.resource.name"])
    deployed = {flow_of(entry).name for entry in ON_A_GPU.deployments}
    assert watched == deployed | {"run", "promote"}
