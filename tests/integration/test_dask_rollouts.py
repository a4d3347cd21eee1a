"""Trajectory groups on a Dask cluster of two workers, with the real policy and judges."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow
from prefect.runtime import flow_run
from test_prefect_rollouts import task_runs_of
from training_parts import prompts, request

from reward_server.client import RewardClient
from tasks.engines.art_loop import map_plainly
from tasks.engines.art_session import open_session
from tasks.rollouts import mapped_on_dask
from tasks.titles.errors import ServiceUnavailable
from tasks.titles.rollout import GroupRoller, Roller, RolloutGroup, Sampling
from tasks.titles.story import Prompt

if TYPE_CHECKING:
    from distributed import LocalCluster

pytest.importorskip("prefect_dask", reason="needs hn-titles[dask]")
pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster:
        yield cluster


async def where(prompt: Prompt) -> int:
    """Return the process that a group is rolled out in."""
    await asyncio.sleep(0.5)
    return os.getpid()


async def broken(prompt: Prompt) -> None:
    raise KeyError("a fault of this program")


# Prefect sends a flow to the workers with each task run: these have nothing around them that cannot be sent.
@flow
async def roll_out_there_and_here(
    run_dir: Path, reward_server_url: str, address: str
) -> tuple[Any, list[RolloutGroup], list[RolloutGroup], list[int]]:
    asked = request(run_dir, reward_server_url)
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
        rollout = GroupRoller(roller, sampling, 3)
        with mapped_on_dask(address) as map_groups:
            there = await map_groups(rollout, asked.train[:3], 4)
            processes = await map_groups(where, prompts("train", 8), 5)
        here = await map_plainly(rollout, asked.train[:3], 4)
    return flow_run.id, there, here, processes


@flow
async def roll_out_broken(address: str) -> None:
    with mapped_on_dask(address) as map_groups:
        await map_groups(broken, prompts("train", 2), 1)


async def test_groups_are_rolled_out_by_both_workers_as_they_would_be_here(
    tmp_path: Path, reward_server_url: str, cluster: LocalCluster
) -> None:
    flow_run_id, there, here, processes = await roll_out_there_and_here(
        tmp_path / "run", reward_server_url, cluster.scheduler_address
    )
    assert len(set(processes)) == 2 and os.getpid() not in processes
    titles = [[[(r.title, r.verdict) for r in g.rollouts] for g in groups] for groups in (there, here)]
    assert titles[0] == titles[1] and [len(group) for group in titles[0]] == [3, 3, 3]
    runs = await task_runs_of(flow_run_id)
    assert {f"group-4-{group.prompt.story.id}" for group in there} <= {run.name for run in runs}
    assert len(runs) == 11 and all(run.state.is_completed() for run in runs)


async def test_a_fault_on_a_worker_ends_the_flow(cluster: LocalCluster) -> None:
    with pytest.raises(KeyError, match="a fault of this program"):
        await roll_out_broken(cluster.scheduler_address)


def test_a_cluster_that_is_not_there_is_named() -> None:
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9"),
        mapped_on_dask("tcp://127.0.0.1:9"),
    ):
        pass
