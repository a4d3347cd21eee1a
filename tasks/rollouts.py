"""Rollouts as Prefect task runs: one per trajectory group, in this process or on a Dask cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.engines.contract import GroupMapper, GroupRollout
from tasks.task_runs import map_task_runs
from tasks.titles.errors import ConfigError, ServiceUnavailable
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


@contextmanager
def mapped_on_dask(address: str) -> Iterator[GroupMapper]:
    """Yield a `GroupMapper` whose task runs are on the workers of the Dask cluster at `address`.

    The workers need this project's environment, and must reach the policy's and the reward server. What they call
    must be picklable, as `GroupRoller` is.

    Raises `ConfigError` without the package prefect-dask and `ServiceUnavailable` where no cluster answers.
    """
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise ConfigError(
            "DASK_SCHEDULER_ADDRESS is set, but prefect-dask is not installed: pip install 'hn-titles[dask]'."
        ) from error

    with DaskTaskRunner(address=address) as runner:
        try:
            # Here, where it can be told what is wrong, and not with the first group.
            runner.client.scheduler_info()
        except (OSError, TimeoutError) as error:
            raise ServiceUnavailable(
                f"No Dask scheduler answers at {address}: {error}. Start one, or unset DASK_SCHEDULER_ADDRESS."
            ) from error

        async def map_groups_on_dask(rollout: GroupRollout, prompts: Sequence[Prompt], step: int) -> list[Any]:
            futures = [
                runner.submit(
                    roll_out_group,
                    {"rollout": rollout, "prompt": prompt, "step": step, "story_id": prompt.story.id},
                )
                for prompt in prompts
            ]
            try:
                return [await asyncio.to_thread(future.result) for future in futures]
            except BaseException:
                for future in futures:
                    future.wrapped_future.cancel()
                raise

        yield map_groups_on_dask
