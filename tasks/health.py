"""Reward servers: started where no address is given, and asked whether they answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import get_state_exception

from reward_server.client import Health, RewardClient
from tasks.engines.judge_server import Role, open_judge
from tasks.titles.config import Settings
from tasks.titles.errors import ServiceUnavailable
from tasks.titles.run_directory import RunDirectory


async def _is_transient(_task: Any, _task_run: Any, state: State[Any]) -> bool:
    # A server that loads a large model answers 503 for a while; one that refuses will go on refusing.
    return isinstance(await get_state_exception(state), ServiceUnavailable)  # type: ignore[misc]


@task(
    name="reward server health",
    task_run_name="health-{role}",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def check_health(client: RewardClient, role: Role) -> Health:
    """Have a reward server score a tiny text."""
    health = await client.health()
    get_run_logger().info("%s: %s, version %s, on %s", role, health.model, health.version, health.device)
    return health


@asynccontextmanager
async def reward_server(
    run: RunDirectory, settings: Settings, role: Role, on_waiting: Callable[[float], None] | None = None
) -> AsyncIterator[RewardClient]:
    """Yield a client of the healthy reward server of `role`; one of our own logs into the run's folder.

    `on_waiting` hears the seconds that it has been starting for.
    """
    async with open_judge(run.profile, settings, role, log_folder=run.path, on_waiting=on_waiting) as client:
        await check_health(client, role)
        yield client


@asynccontextmanager
async def heldout_reward_server(run: RunDirectory, settings: Settings) -> AsyncIterator[RewardClient | None]:
    """Yield a client of the reward model that training never sees, None where there is none."""
    if settings.heldout_reward_model_url is None and run.profile.heldout_reward_model is None:
        yield None
        return
    async with reward_server(run, settings, "heldout-reward-model") as client:
        yield client
