"""Brings a Prefect server to what the plan asks for: work pools, limits, deployments and automations.

Exclusive deployments of a pool share one global concurrency limit. Prefect's own `deploy` cannot do that: it gives each
deployment a limit of its own, and the limit of a pool or a queue counts runs whose process is gone. A slot of the
shared limit is leased: it comes free when its run ends or is found dead, and in any case five minutes after its
process was last heard of. Prefect deletes the limit with any deployment that has it; applied again, it is back.

What people switch in the UI stays so: whether a schedule or an automation is on, and where a pool's runs work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import SecretStr

from flows.deployment_plan import Deployment, Plan, WorkPool, wants_webhook, with_webhook
from flows.form import form_schema
from flows.job_templates import job_template
from tasks.titles.errors import ServiceUnavailable

WEBHOOK_BLOCK = "hn-titles-notifications"

Outcome = Literal["created", "updated", "unchanged", "skipped"]


@dataclass(frozen=True)
class Applied:
    """What became of one item."""

    kind: str
    name: str
    outcome: Outcome
    note: str = ""


Listener = Callable[[Applied], None]


async def apply_plan(
    plan: Plan,
    automations: list[dict[str, Any]],
    *,
    working_dir: Path | None = None,
    image: str | None = None,
    webhook_url: str | None = None,
    on_applied: Listener = lambda _: None,
) -> list[Applied]:
    """Create what is missing, update what differs, and say what became of each item.

    `working_dir` is where the pools' runs work: it holds runs/ and .env. None keeps what a pool has, and gives a new
    one the present directory. `image` is the containers' image without its tag; None keeps what a pool has.

    Raises `ConfigError` where a pool's type has no use for one of them, and `ServiceUnavailable` where the server does
    not answer.
    """
    applied: list[Applied] = []

    def tell(item: Applied) -> None:
        applied.append(item)
        on_applied(item)

    try:
        async with get_client() as client:
            limits = {}
            for pool in plan.work_pools:
                tell(await _apply_pool(client, pool, working_dir, image))
                limits[pool.name], item = await _apply_limit(client, pool)
                tell(item)
            for entry in plan.deployments:
                limit = limits[entry.work_pool.name] if entry.concurrency_limit else None
                tell(await _apply_deployment(client, entry, limit))
            block_id, item = await _apply_webhook(webhook_url)
            tell(item)
            for automation in automations:
                tell(await _apply_automation(client, automation, block_id))
    except httpx.TransportError as error:
        raise ServiceUnavailable(
            f"Prefect's server does not answer ({type(error).__name__}: {error}). Start it with 'make up' or "
            "'prefect server start', and set PREFECT_API_URL to its address, such as http://127.0.0.1:4200/api."
        ) from error
    return applied


async def _apply_pool(client: PrefectClient, pool: WorkPool, working_dir: Path | None, image: str | None) -> Applied:
    try:
        found = await client.read_work_pool(pool.name)
    except ObjectNotFound:
        template = job_template(pool, None, working_dir=working_dir, image=image)
        await client.create_work_pool(
            WorkPoolCreate(name=pool.name, type=pool.type, description=pool.description, base_job_template=template)
        )
        return Applied("work pool", pool.name, "created")
    if found.type != pool.type:
        note = f"it is of type {found.type} and used as it is; for {pool.type} delete it first"
        return Applied("work pool", pool.name, "unchanged", note)
    template = job_template(pool, found.base_job_template, working_dir=working_dir, image=image)
    if (found.description, found.base_job_template) == (pool.description, template):
        return Applied("work pool", pool.name, "unchanged")
    await client.update_work_pool(pool.name, WorkPoolUpdate(description=pool.description, base_job_template=template))
    return Applied("work pool", pool.name, "updated")


async def _apply_limit(client: PrefectClient, pool: WorkPool) -> tuple[str, Applied]:
    name = pool.limit_name
    try:
        found = await client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        new = await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=pool.at_once))
        return str(new), Applied("concurrency limit", name, "created")
    if found.limit == pool.at_once:
        return str(found.id), Applied("concurrency limit", name, "unchanged")
    await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=pool.at_once))
    return str(found.id), Applied("concurrency limit", name, "updated")


async def _apply_deployment(client: PrefectClient, entry: Deployment, limit_id: str | None) -> Applied:
    # Its imports take a while; what was applied before is said meanwhile.
    flow: Flow[..., Any] = await asyncio.to_thread(load_flow_from_entrypoint, entry.entrypoint, False)
    wanted: dict[str, Any] = {
        "entrypoint": entry.entrypoint,
        "version": flow.version,
        "description": entry.description or flow.description,
        "tags": entry.tags,
        "work_pool_name": entry.work_pool.name,
        "parameters": entry.parameters,
        "parameter_openapi_schema": form_schema(
            parameter_schema(flow).model_dump(mode="json"), {name: entry.parameters[name] for name in entry.fixed}
        ),
        "enforce_parameter_schema": True,
        "pull_steps": [],
        "global_concurrency_limit_id": limit_id,
        "concurrency_options": entry.concurrency_limit.model_dump(exclude={"limit"})
        if entry.concurrency_limit
        else None,
        "schedules": [
            {
                "slug": schedule.slug,
                "active": schedule.active,
                "schedule": {"cron": schedule.cron, "timezone": schedule.timezone, "day_or": True},
            }
            for schedule in entry.schedules
        ],
    }
    try:
        found = _state_of((await client.read_deployment_by_name(f"{flow.name}/{entry.name}")).model_dump(mode="json"))
    except ObjectNotFound:
        outcome: Outcome = "created"
    else:
        switched = {schedule["slug"]: schedule["active"] for schedule in found["schedules"]}
        for schedule in wanted["schedules"]:
            schedule["active"] = switched.get(schedule["slug"], schedule["active"])
        if found == wanted:
            return Applied("deployment", f"{flow.name}/{entry.name}", "unchanged")
        outcome = "updated"
    flow_id = await client.create_flow_from_name(flow.name)
    # Not through create_deployment: it also sends an empty limit of the deployment's own, at which the server deletes
    # the shared one.
    await client.request("POST", "/deployments/", json={"name": entry.name, "flow_id": str(flow_id), **wanted})
    return Applied("deployment", f"{flow.name}/{entry.name}", outcome)


def _state_of(deployment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a deployment on the server is, in the form in which it is asked for."""
    plain = ("entrypoint", "version", "description", "tags", "work_pool_name", "parameters", "parameter_openapi_schema")
    limit = deployment["global_concurrency_limit"]
    return {
        **{key: deployment[key] for key in (*plain, "enforce_parameter_schema", "concurrency_options")},
        "pull_steps": deployment["pull_steps"] or [],
        "global_concurrency_limit_id": limit["id"] if limit else None,
        "schedules": [
            {"slug": schedule["slug"], "active": schedule["active"], "schedule": schedule["schedule"]}
            for schedule in sorted(deployment["schedules"], key=lambda schedule: schedule["slug"] or "")
        ],
    }


async def _apply_webhook(url: str | None) -> tuple[str | None, Applied]:
    kind = "notification address"
    if url is None:
        return None, Applied(kind, WEBHOOK_BLOCK, "skipped", "set NOTIFICATION_WEBHOOK_URL to be told of failed runs")
    outcome: Outcome = "updated"
    try:
        found: Any = await Webhook.aload(WEBHOOK_BLOCK)
    except ValueError:
        outcome = "created"
    else:
        if found.url.get_secret_value() == url:
            return str(found._block_document_id), Applied(kind, WEBHOOK_BLOCK, "unchanged")
    block_id = await Webhook(url=SecretStr(url)).asave(WEBHOOK_BLOCK, overwrite=True)
    return str(block_id), Applied(kind, WEBHOOK_BLOCK, outcome)


async def _apply_automation(client: PrefectClient, automation: dict[str, Any], block_id: str | None) -> Applied:
    name = automation["name"]
    if wants_webhook(automation):
        if block_id is None:
            return Applied("automation", name, "skipped", "it needs NOTIFICATION_WEBHOOK_URL")
        automation = with_webhook(automation, block_id)
    wanted = AutomationCore.model_validate(automation)
    found = await client.read_automations_by_name(name)
    if not found:
        await client.create_automation(wanted)
        return Applied("automation", name, "created")
    wanted = wanted.model_copy(update={"enabled": found[0].enabled})
    # As models: their sets of event names have no order.
    if AutomationCore.model_validate(found[0].model_dump(include=set(AutomationCore.model_fields))) == wanted:
        return Applied("automation", name, "unchanged")
    await client.update_automation(found[0].id, wanted)
    return Applied("automation", name, "updated")
