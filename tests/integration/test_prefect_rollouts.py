"""Trajectory groups as Prefect task runs, in Prefect's own harness, with the real policy and judges."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import TaskRunSort
from prefect.runtime import flow_run
from training_parts import prompts, request

from reward_server.client import RewardClient
from tasks import task_runs
from tasks.engines.art_loop import map_plainly
from tasks.engines.art_session import open_session
from tasks.rollouts import map_groups
from tasks.titles.rollout import Roller, RolloutGroup, Sampling
from tasks.titles.story import Prompt

pytestmark = pytest.mark.usefixtures("prefect_harness")


async def task_runs_of(flow_run_id: Any) -> list[Any]:
    """Return the task runs; Prefect writes them a moment after they end."""
    async with get_client() as client:
        for _ in range(100):
            only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            runs = await client.read_task_runs(flow_run_filter=only, sort=TaskRunSort.END_TIME_DESC)
            if runs and all(run.state is not None and run.state.is_final() for run in runs):
                return runs
            await asyncio.sleep(0.1)
    raise AssertionError("Prefect never stored the task runs")


async def test_one_task_run_per_group(tmp_path: Path, reward_server_url: str) -> None:
    asked = request(tmp_path / "run", reward_server_url)

    @flow
    async def roll_out() -> tuple[Any, list[RolloutGroup], list[RolloutGroup]]:
        async with (
            open_session(asked) as (session, _),
            RewardClient(reward_server_url) as reward_client,
            Roller(
                endpoint=session,
                reward_client=reward_client,
                max_completion_tokens=24,
                context_tokens=session.context_tokens,
                concurrency=8,
            ) as roller,
        ):
            sampling = Sampling(model=await session.model_name(0), temperature=1.0, run_seed=1, step=0)

            async def one_group(prompt: Prompt) -> RolloutGroup:
                return await roller.group(prompt, sampling, 3)

            mapped = await map_groups(one_group, asked.train[:3], 4)
            plain = await map_plainly(one_group, asked.train[:3], 4)
        return flow_run.id, mapped, plain

    flow_run_id, mapped, plain = await roll_out()
    ids = [prompt.story.id for prompt in asked.train[:3]]
    assert [group.prompt.story.id for group in mapped] == ids
    # The switch between task runs and plain coroutines changes nothing about the titles.
    titles = [[[(r.title, r.verdict) for r in g.rollouts] for g in groups] for groups in (mapped, plain)]
    assert titles[0] == titles[1]
    runs = await task_runs_of(flow_run_id)
    assert sorted(run.name for run in runs) == sorted(f"group-4-{identifier}" for identifier in ids)
    assert all(run.state.is_completed() for run in runs)


async def test_so_many_groups_are_open_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_runs, "OPEN_AT_ONCE", 4)
    under_way, most = 0, 0
    asked = prompts("train", 10)

    async def counted(prompt: Prompt) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.3)
        under_way -= 1
        return prompt.story.id

    @flow
    async def roll_out() -> list[str]:
        return await map_groups(counted, asked, 1)

    assert await roll_out() == [prompt.story.id for prompt in asked]
    assert most == 4


async def test_a_chunk_waits_until_the_one_before_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_runs, "CHUNK", 4)
    asked = prompts("train", 10)
    stored_before: dict[str, int] = {}

    async def looked_up(prompt: Prompt) -> str:
        async with get_client() as client:
            only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
            runs = await client.read_task_runs(flow_run_filter=only)
        stored_before[prompt.story.id] = sum(run.state is not None and run.state.is_completed() for run in runs)
        return prompt.story.id

    @flow
    async def roll_out() -> list[str]:
        return await map_groups(looked_up, asked, 1)

    assert await roll_out() == [prompt.story.id for prompt in asked]
    counts = list(stored_before.values())
    assert min(counts[4:8]) >= 4
    assert min(counts[8:]) >= 8


async def test_a_fault_ends_the_flow_and_nothing_is_tried_again() -> None:
    asked, asked_for = prompts("train", 1), []

    async def broken(prompt: Prompt) -> None:
        asked_for.append(prompt.story.id)
        raise KeyError("a fault of this program")

    @flow
    async def roll_out() -> None:
        await map_groups(broken, asked, 1)

    with pytest.raises(KeyError, match="a fault of this program"):
        await roll_out()
    assert asked_for == [asked[0].story.id]
