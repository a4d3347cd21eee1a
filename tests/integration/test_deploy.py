"""Deployments on a real Prefect server: applied twice, waiting for each other, and run by a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleUpdate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.states import Crashed, Pending, Running

from flows.deploy import WEBHOOK_BLOCK, Applied, apply_plan
from flows.deployment_plan import Plan, PoolType, read_automations, read_plan
from tasks.starter.world import generate_stories
from tasks.titles.config import load_profile
from tasks.titles.errors import ServiceUnavailable

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ON_A_CPU = read_plan(load_profile("starter"), "starter")
ON_A_GPU = read_plan(load_profile("qwen-0.5b"), "qwen-0.5b")
EXCLUSIVE = [
    "train-reward-model/train-reward-model", "train/train-art", "train/train-trl", "evaluate/evaluate",
    "compare/compare", "nightly/nightly",
]  # fmt: skip
ADDRESS = "http://127.0.0.1:9/told"


def prefect(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Prefect's own command with the harness's server."""
    own = {"PREFECT_API_URL": str(get_current_settings().api.url), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **own}, capture_output=True, text=True, timeout=180, check=False
    )


async def apply(plan: Plan = ON_A_CPU, **options: Any) -> dict[str, str]:
    """Apply the plan and return the outcome of each item."""
    applied = await apply_plan(plan, read_automations(), **{"webhook_url": ADDRESS, **options})
    return {f"{item.kind} {item.name}": item.outcome for item in applied}


async def read(client: PrefectClient, name: str) -> DeploymentResponse:
    return await client.read_deployment_by_name(name)


async def test_the_second_time_nothing_changes(tmp_path: Path) -> None:
    told: list[Applied] = []
    first = await apply(on_applied=told.append, working_dir=tmp_path)
    assert [f"{item.kind} {item.name}" for item in told] == list(first)
    assert len(first) == 2 + 2 + 7 + 1 + 4
    assert set(first.values()) == {"created"}
    assert set((await apply()).values()) == {"unchanged"}
    assert set((await apply(working_dir=tmp_path)).values()) == {"unchanged"}


async def test_an_older_address_is_replaced_and_none_is_said() -> None:
    await apply()
    outcomes = await apply(webhook_url="http://127.0.0.1:9/elsewhere")
    assert outcomes.pop(f"notification address {WEBHOOK_BLOCK}") == "updated"
    assert set(outcomes.values()) == {"unchanged"}
    assert (await Webhook.aload(WEBHOOK_BLOCK)).url.get_secret_value().endswith("/elsewhere")
    outcomes = await apply(webhook_url=None)
    assert {name for name, outcome in outcomes.items() if outcome == "skipped"} == {
        f"notification address {WEBHOOK_BLOCK}", "automation hn-titles run failed", "automation hn-titles run stuck",
    }  # fmt: skip


async def test_what_was_switched_in_the_ui_stays_so() -> None:
    await apply()
    async with get_client() as client:
        found = await read(client, "nightly/nightly")
        (schedule,) = found.schedules
        assert not schedule.active
        await client.request(
            "PATCH",
            f"/deployments/{found.id}/schedules/{schedule.id}",
            json=DeploymentScheduleUpdate(active=True).model_dump(mode="json", exclude_unset=True),
        )
        (automation,) = await client.read_automations_by_name("hn-titles run stuck")
        await client.pause_automation(automation.id)
        assert set((await apply()).values()) == {"unchanged"}
        await apply(ON_A_GPU)
        await apply()
        (schedule,) = (await read(client, "nightly/nightly")).schedules
        assert schedule.active
        (automation,) = await client.read_automations_by_name("hn-titles run stuck")
        assert not automation.enabled


async def test_another_profile_moves_what_trains_to_its_pool() -> None:
    await apply()
    outcomes = await apply(ON_A_GPU)
    moved = {name for name, outcome in outcomes.items() if outcome == "updated"}
    assert moved == {f"deployment {name}" for name in ("prepare-data/prepare-data", *EXCLUSIVE)}
    async with get_client() as client:
        deployments = [await read(client, name) for name in EXCLUSIVE if name != "evaluate/evaluate"]
    assert {one.work_pool_name for one in deployments} == {"gpu"}
    assert {one.global_concurrency_limit.name for one in deployments if one.global_concurrency_limit} == {
        "hn-titles-gpu"
    }
    assert {one.parameters["profile"] for one in deployments} == {"qwen-0.5b"}


async def test_a_pool_of_another_type_is_left_alone(tmp_path: Path) -> None:
    pool = ON_A_CPU.pool("gpu").model_copy(update={"name": "containers"})
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name="containers", type="docker", base_job_template={}))
        applied = await apply_plan(Plan(work_pools=[pool], deployments=[]), [], working_dir=tmp_path)
        assert applied[0].outcome == "unchanged" and "docker" in applied[0].note
        assert (await client.read_work_pool("containers")).base_job_template == {}


async def test_the_form_has_choices_ranges_and_descriptions() -> None:
    await apply()
    async with get_client() as client:
        schema = (await read(client, "train/train-art")).parameter_openapi_schema
    assert schema is not None
    fields = schema["properties"]
    assert fields["profile"]["enum"] == ["qwen-0.5b", "qwen-7b", "starter", "starter-gpu"]
    assert fields["engine"]["enum"] == ["art"]
    assert fields["max_steps"].items() >= {"type": "integer", "minimum": 1, "maximum": 100_000}.items()
    assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"engine": "trl"}, "engine"), ({"max_steps": 0}, "max_steps"), ({"profile": "x"}, "profile")],
)
async def test_the_server_refuses_what_the_form_does_not_offer(parameters: dict[str, Any], field: str) -> None:
    await apply()
    async with get_client() as client:
        found = await read(client, "train/train-art")
        with pytest.raises(PrefectHTTPStatusError) as refused:
            await client.create_flow_run_from_deployment(found.id, parameters=parameters)
        assert refused.value.response.status_code == 409 and field in refused.value.response.text
        run = await client.create_flow_run_from_deployment(found.id, parameters={"max_steps": None, "seed": 3})
        assert run.parameters == {"profile": "starter", "engine": "art", "max_steps": None, "seed": 3}
        await client.delete_flow_run(run.id)


@pytest.mark.parametrize("pool_type", ["docker", "kubernetes"])
async def test_the_same_deployments_on_pools_for_containers(pool_type: PoolType) -> None:
    async with get_client() as client:
        for pool in ON_A_GPU.work_pools:
            with contextlib.suppress(ObjectNotFound):
                await client.delete_work_pool(pool.name)
        plan = read_plan(load_profile("qwen-0.5b"), "qwen-0.5b", pool_type=pool_type)
        first = await apply(plan, image="registry.example.com/hn-titles")
        assert first["work pool gpu"] == "created"
        assert set((await apply(plan)).values()) == {"unchanged"}
        pool = await client.read_work_pool("gpu")
        assert pool.type == pool_type
        fields = pool.base_job_template["variables"]["properties"]
        assert fields["image"]["default"] == "registry.example.com/hn-titles:gpu" and fields["gpus"]["default"]
        trained = await read(client, "train/train-art")
        assert trained.work_pool_name == "gpu" and trained.global_concurrency_limit is not None
        for name in ("cpu", "gpu"):
            await client.delete_work_pool(name)


async def test_prefects_own_command_deploys_all_of_it_and_ours_brings_the_rest() -> None:
    await apply(ON_A_GPU)
    async with get_client() as client:
        await client.delete_deployment((await read(client, "train/train-art")).id)
        assert (await read(client, "train/train-trl")).global_concurrency_limit is None, "it goes with any of them"
        done = prefect("deploy", "--all", "--prefect-file", "deployments/prefect.yaml", cwd=ROOT)
        assert done.returncode == 0, (done.stdout, done.stderr)
        for name in EXCLUSIVE:
            plain = await read(client, name)
            assert plain.global_concurrency_limit is not None
            assert plain.global_concurrency_limit.name == f"deployment:{plain.id}", "a limit of its own"
        outcomes = await apply(ON_A_GPU)
        assert outcomes["concurrency limit hn-titles-gpu"] == "created"
        for name in EXCLUSIVE:
            assert outcomes[f"deployment {name}"] == "updated"
            shared = (await read(client, name)).global_concurrency_limit
            assert shared is not None and shared.name == "hn-titles-gpu"


async def test_the_second_training_waits_until_the_first_is_over() -> None:
    await apply()
    async with get_client() as client:
        first, second = [
            await client.create_flow_run_from_deployment((await read(client, name)).id)
            for name in ("train/train-art", "train/train-trl")
        ]
        taken = await client.set_flow_run_state(first.id, Pending())
        assert taken.status == SetStateStatus.ACCEPT
        assert (await client.set_flow_run_state(first.id, Running())).status == SetStateStatus.ACCEPT
        refused = await client.set_flow_run_state(second.id, Pending())
        assert refused.status == SetStateStatus.REJECT
        assert refused.state is not None and refused.state.name == "AwaitingConcurrencySlot"
        # What the automation does to a run whose process was killed.
        crashed = await client.set_flow_run_state(first.id, Crashed(message="no heartbeat"))
        assert crashed.status == SetStateStatus.ACCEPT
        # Asked again and again, as a worker does: where the server's database is busy the slot is free a little later.
        async with asyncio.timeout(240):
            while (await client.set_flow_run_state(second.id, Pending())).status != SetStateStatus.ACCEPT:
                await asyncio.sleep(1)
        await client.delete_flow_run(first.id)
        await client.set_flow_run_state(second.id, Crashed(message="over"))


async def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    nowhere = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(nowhere), pytest.raises(ServiceUnavailable, match="does not answer"):
        await apply()


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a small file of stories."""
    rows = [json.dumps(asdict(story), default=lambda value: value.isoformat()) for story in generate_stories(120)]
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "stories.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


async def test_a_worker_elsewhere_runs_it_where_the_stories_are(workplace: Path, tmp_path: Path) -> None:
    await apply(working_dir=workplace)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with get_client() as client:
        found = await read(client, "prepare-data/prepare-data")
        parameters = {**found.parameters, "stories": "stories.jsonl", "minimum_score": 0}
        run = await client.create_flow_run_from_deployment(found.id, parameters=parameters)
        worker = prefect("worker", "start", "--pool", "cpu", "--type", "process", "--run-once", cwd=elsewhere)
        run = await client.read_flow_run(run.id)
    assert run.state_type == StateType.COMPLETED, (run.state, worker.stdout, worker.stderr)
    assert list((workplace / "runs" / ".cache").glob("prompts-*.parquet"))
    assert list(elsewhere.iterdir()) == []
