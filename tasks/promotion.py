"""Promotion as Prefect tasks: register the best checkpoint, move the alias, tell why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from reward_server.client import RewardClient
from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.resume import adapter_folder
from tasks.engines.tracker import MlflowTracker
from tasks.evaluation import evaluate_titles, measured_with
from tasks.titles.promotion import Decision, JudgedPolicy, Version
from tasks.titles.rollout import Endpoint
from tasks.titles.run_directory import RunDirectory
from tasks.titles.story import Prompt
from tasks.tracking import links


@task(name="register candidate", cache_policy=NO_CACHE, persist_result=False)
def register_candidate(
    run: RunDirectory, tracker: MlflowTracker, registry: PolicyRegistry, policy: JudgedPolicy
) -> Version:
    """Make a run's checkpoint a version of the registered model; twice is the same version."""
    # Training may have gone on without MLflow: what it holds already stays as it is.
    tracker.log_checkpoint(policy.step, adapter_folder(run.path, run.profile.engine, policy.step), {})
    version = registry.register(tracker.run_id, policy)
    get_run_logger().info("%s is %s", policy.name, version.uri)
    return version


@task(name="present champion", cache_policy=NO_CACHE, persist_result=False)
def present_champion(registry: PolicyRegistry) -> Version | None:
    """Return the version that the alias stands at, None where there is none."""
    champion = registry.champion()
    get_run_logger().info("Champion of %s: %s", registry.name, champion.policy.name if champion else "none")
    return champion


@task(name="judge both again", cache_policy=NO_CACHE, persist_result=False)
async def judge_both_again(
    run: RunDirectory,
    registry: PolicyRegistry,
    versions: Mapping[str, Version],
    prompts: Sequence[Prompt],
    *,
    endpoint: Endpoint,
    served: Mapping[str, str],
    reward_client: RewardClient,
    on_progress: Callable[[int, int], None],
) -> dict[str, Version]:
    """Have all `versions` write and be judged in one sitting, and store their new evaluations.

    `served` maps the same names to those that the endpoint serves them under.
    """
    ruler = await measured_with(run.profile, prompts, reward_client)
    titles = await evaluate_titles(
        run.profile,
        prompts,
        endpoint=endpoint,
        writers=served,
        reward_client=reward_client,
        heldout_client=None,
        on_progress=on_progress,
    )
    judged = {}
    for writer, version in versions.items():
        judged[writer] = replace(version, policy=version.policy.judged_again(titles, writer, ruler))
        registry.store_evaluation(judged[writer])
    return judged


@task(name="carry out decision", cache_policy=NO_CACHE, persist_result=False)
def carry_out(registry: PolicyRegistry, decision: Decision, lock_folder: Path) -> bool:
    """Move the alias where the decision says so, and write the reason to the version.

    Returns False where another promotion has moved it meanwhile: then the decision says nothing any more.
    """
    if decision.promoted and not registry.crown(
        decision.candidate, instead_of=decision.champion, lock_folder=lock_folder
    ):
        get_run_logger().info("Another promotion came first; the candidate is set against the new champion.")
        return False
    if decision.difference is not None:
        registry.describe(decision.candidate, decision.reason)
    get_run_logger().info("%s", decision.reason)
    return True


@task(name="show decision", cache_policy=NO_CACHE, persist_result=False)
async def show_decision(run: RunDirectory, tracker: MlflowTracker, decision: Decision) -> None:
    """Keep the decision with its figures as a Markdown artifact."""
    await acreate_markdown_artifact(
        decision.markdown(links(run, tracker)), key="promotion", description=f"Promotion of {run.name}"
    )
