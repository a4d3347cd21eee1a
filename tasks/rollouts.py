"""Rollouts as Prefect task runs: one per trajectory group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.engines.contract import GroupRollout
from tasks.task_runs import map_task_runs
from tasks.titles.story import Prompt


# Not cached and not retried: titles are sampled anew at each step, and what is transient is retried per
# request, one level below. Results are not stored: they hold every token's log-probability.
@task(
    name="trajectory group",
    task_run_name="group-{step}-{story_id}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=0,
)
async def roll_out_group(rollout: GroupRollout, prompt: Prompt, step: int, story_id: str) -> Any:
    """Roll out one trajectory group."""
    return await rollout(prompt)


async def map_groups(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
    """Run one task run per prompt and keep their order: a `GroupMapper`."""

    async def task_run(work: GroupRollout, prompt: Prompt) -> Any:
        return await roll_out_group(work, prompt, step, prompt.story.id)

    return await map_task_runs(task_run, rollout, prompts)
