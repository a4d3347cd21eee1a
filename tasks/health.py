"""Reward servers: started where no address is given, and asked whether they answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import get_state_exception

from reward_server.client import Health, RewardClient
from reward_server.process import RewardServerProcess
from tasks.starter.paths import HELDOUT_REWARD_MODEL, REWARD_MODEL, resolve
from tasks.titles.config import Settings
from tasks.titles.errors import ServiceUnavailable
from tasks.titles.run_directory import RunDirectory

Role = Literal["reward-model", "heldout-reward-model"]


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
    """Yield a client of the healthy reward server of `role`.

    The server is the one at the address that the settings give, or else one of our own on a free port that
    logs into the run's folder and ends with this context, however it is left. `on_waiting` hears the
    seconds that it has been starting for.
    """
    profile = run.profile
    key = settings.reward_model_api_key.get_secret_value() if settings.reward_model_api_key else None
    if role == "reward-model":
        url, model = settings.reward_model_url, resolve(profile.reward_model, REWARD_MODEL)
    else:
        url = settings.heldout_reward_model_url
        model = resolve(profile.heldout_reward_model or "", HELDOUT_REWARD_MODEL)
    if url is not None:
        async with RewardClient(url, key) as client:
            await check_health(client, role)
            yield client
        return
    log_path = run.path / f"{role}.log"
    async with (
        RewardServerProcess(model, log_path=log_path, device=profile.device, on_progress=on_waiting) as server,
        RewardClient(server.url) as client,
    ):
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
