"""Evaluate a run on the test stories: base model, best and last checkpoint and human titles before the same judges."""

from __future__ import annotations

import time

from prefect import flow

from flows.form import Overrides, ProfileName, RunName, TestStories, filled_in
from flows.progress import tell
from flows.termination import no_sigterm_lost
from tasks.data import prepare_prompts_task
from tasks.engines.policy_server import serve_checkpoints
from tasks.evaluation import evaluate_titles, measure_reward_model, measured_with, store_evaluation
from tasks.health import heldout_reward_server, reward_server
from tasks.titles.config import Settings
from tasks.titles.run_directory import find_run
from tasks.titles.summary import Evaluation, evaluate_figures
from tasks.tracking import flow_run_label, show_results, tracked
from tasks.training import base_model_of, checkpoint_folders, training_facts
from tasks.watching import name_after


@flow(name="evaluate", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def evaluate_run(
    run_name: RunName = None,
    profile: ProfileName | None = None,
    overrides: Overrides = None,
    test_stories: TestStories = None,
) -> Evaluation:
    """Evaluate a run's best and last checkpoint against the base model and the human titles.

    Args:
        run_name: run to evaluate; empty: the newest one
        profile: where no run is named, the newest one of the profile of this name
        overrides: other settings of the evaluation that differ from the run's, each `key=value`
        test_stories: stories to write titles for, at most; empty: the run's
    """
    settings = Settings()
    changes = filled_in(overrides, {"test_stories": test_stories})
    run = find_run(settings.runs_dir, run_name=run_name, profile_name=profile, overrides=changes)
    await name_after(run)
    with run.locked(), tracked(run, settings.tracking_uri) as tracker:
        started = time.monotonic()
        training = training_facts(run)
        prompts = prepare_prompts_task(run.profile, settings.runs_dir / ".cache")
        async with (
            no_sigterm_lost(),
            reward_server(run, settings, "reward-model", lambda waited: tell("judges", waited)) as judge,
            heldout_reward_server(run, settings) as heldout,
            serve_checkpoints(run.profile, base_model_of(run.profile), checkpoint_folders(run, training)) as server,
        ):
            tell("judges", 1, 1)
            ruler = await measured_with(run.profile, prompts.test, judge)
            titles = await evaluate_titles(
                run.profile,
                prompts.test,
                endpoint=server,
                writers={"base": server.base_model_name, **server.names},
                reward_client=judge,
                heldout_client=heldout,
                on_progress=lambda done, total: tell("evaluation", done, total),
            )
            quality = await measure_reward_model(run.profile.stories, judge)
        evaluation = evaluate_figures(
            run.name,
            run.profile,
            training,
            titles,
            ruler=ruler,
            reward_model=quality,
            seconds=time.monotonic() - started,
        )
        store_evaluation(run, tracker, evaluation)
        await show_results(run, tracker, evaluation)
        run.update(state="evaluated")
    return evaluation
