"""Promote a run's best checkpoint to champion, if it is surely better on the same test stories."""

from __future__ import annotations

from collections.abc import Mapping

from prefect import flow

from flows.form import Overrides, ProfileName, RunName
from flows.progress import tell
from tasks.data import prepare_prompts_task
from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.policy_server import serve_checkpoints
from tasks.health import reward_server
from tasks.promotion import carry_out, judge_both_again, present_champion, register_candidate, show_decision
from tasks.titles.config import Settings
from tasks.titles.promotion import Decision, Version, check_same_base, decide, different_ruler, read_candidate
from tasks.titles.run_directory import RunDirectory, find_run
from tasks.tracking import flow_run_label, tracked
from tasks.training import base_model_of


@flow(name="promote", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def promote_run(
    run_name: RunName = None, profile: ProfileName | None = None, overrides: Overrides = None
) -> Decision:
    """Register the best checkpoint of an evaluated run; make it champion where it is better than the present one.

    Args:
        run_name: run to promote; empty: the newest one
        profile: where no run is named, the newest one of the profile of this name
        overrides: settings of the promotion that differ from the run's, each `key=value`
    """
    settings = Settings()
    run = find_run(settings.runs_dir, run_name=run_name, profile_name=profile, overrides=overrides or [])
    with run.locked(), tracked(run, settings.tracking_uri) as tracker:
        found = read_candidate(run)
        registry = PolicyRegistry(run.profile.registered_name, settings.tracking_uri)
        candidate = register_candidate(run, tracker, registry, found.policy)
        decision = None
        while decision is None or not carry_out(registry, decision, settings.runs_dir / ".cache"):
            decision = await set_against_champion(run, settings, registry, candidate, found.base)
        await show_decision(run, tracker, decision)
    return decision


async def set_against_champion(
    run: RunDirectory, settings: Settings, registry: PolicyRegistry, candidate: Version, base: Mapping[str, float]
) -> Decision:
    """Compare the candidate with the present champion, after a rematch where other things were measured with."""
    champion = present_champion(registry)
    different = different_ruler(candidate, champion)
    if champion and different:
        candidate, champion = await rematch(run, settings, registry, candidate, champion)
    return decide(candidate, champion, base, judged_again=different)


async def rematch(
    run: RunDirectory, settings: Settings, registry: PolicyRegistry, candidate: Version, champion: Version
) -> tuple[Version, Version]:
    """Have both write for the run's test stories in one sitting, before the same judges."""
    check_same_base(candidate.policy, champion.policy)
    versions = {"candidate": candidate, "champion": champion}
    prompts = prepare_prompts_task(run.profile, settings.runs_dir / ".cache")
    with registry.adapter(candidate) as first, registry.adapter(champion) as second:
        folders = {"candidate": first, "champion": second}
        async with (
            reward_server(run, settings, "reward-model", lambda waited: tell("judges", waited)) as judge,
            serve_checkpoints(run.profile, base_model_of(run.profile), folders) as server,
        ):
            tell("judges", 1, 1)
            judged = await judge_both_again(
                run,
                registry,
                versions,
                prompts.test,
                endpoint=server,
                served=server.names,
                reward_client=judge,
                on_progress=lambda done, total: tell("evaluation", done, total),
            )
    return judged["candidate"], judged["champion"]
