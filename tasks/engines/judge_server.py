"""The reward servers that a profile names: at an address of the settings', or in a process of our own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from reward_server.client import RewardClient
from reward_server.process import RewardServerProcess
from tasks.starter.paths import HELDOUT_REWARD_MODEL, REWARD_MODEL, resolve
from tasks.titles.config import Profile, Settings

Role = Literal["reward-model", "heldout-reward-model"]


@asynccontextmanager
async def open_judge(
    profile: Profile,
    settings: Settings,
    role: Role,
    *,
    log_folder: Path,
    on_waiting: Callable[[float], None] | None = None,
) -> AsyncIterator[RewardClient]:
    """Yield a client of the reward server of `role`.

    The server is the one whose address the settings give, or else one of our own on a free port that
    logs into `log_folder` and ends with this context, however it is left. `on_waiting` hears the seconds that it has
    been starting for.
    """
    key = settings.reward_model_api_key.get_secret_value() if settings.reward_model_api_key else None
    if role == "reward-model":
        model = resolve(profile.reward_model, REWARD_MODEL)
        url = settings.reward_server_of(model)
    else:
        url = settings.heldout_reward_model_url
        model = resolve(profile.heldout_reward_model or "", HELDOUT_REWARD_MODEL)
    if url is not None:
        async with RewardClient(url, key) as client:
            yield client
        return
    log_path = log_folder / f"{role}.log"
    async with (
        RewardServerProcess(model, log_path=log_path, device=profile.device, on_progress=on_waiting) as server,
        RewardClient(server.url) as client,
    ):
        yield client
