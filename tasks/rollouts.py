"""Rollouts as Prefect task runs: one per trajectory group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.engines.contract import GroupRollout
from tasks.titles.story import Prompt
from tasks.titles.together import together

# Some two thousand task runs at once made a self-hosted Prefect server unstable
# (https://github.com/PrefectHQ/prefect/issues/18883); a step has a few dozen groups at most.
TASK_RUNS_AT_ONCE = 100


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
    """Run one task run per prompt, a chunk of them at the same time, and keep their order.

    Awaited calls cost about 6 ms a task run; `.map` on a thread pool costs about 55 ms.
    """
    groups: list[Any] = []
    for start in range(0, len(prompts), TASK_RUNS_AT_ONCE):
        chunk = prompts[start : start + TASK_RUNS_AT_ONCE]
        groups += await together(roll_out_group(rollout, prompt, step, prompt.story.id) for prompt in chunk)
    return groups
