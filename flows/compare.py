"""Compare both engines: train each with the same seeds, then judge all that they write with one ruler."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow

from flows.form import MaxSteps, Overrides, ProfileName, RunName, Seeds, Stories, TestStories, filled_in
from flows.progress import tell
from flows.termination import no_sigterm_lost
from flows.train import train_titles
from tasks.comparison import compare_command, compared_run, show_comparison, store_comparison
from tasks.data import prepare_prompts_task
from tasks.engines.policy_server import serve_checkpoints
from tasks.evaluation import evaluate_titles
from tasks.health import heldout_reward_server, reward_server
from tasks.titles.comparison import Comparison
from tasks.titles.comparison_runs import named_runs, open_comparison, plan
from tasks.titles.config import Settings, load_profile
from tasks.titles.run_directory import RunDirectory, find_run
from tasks.tracking import flow_run_label, tracked
from tasks.training import base_model_of, checkpoint_folders

SEEDS = (1, 2, 3)


@flow(name="compare", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def compare_engines(
    profile: ProfileName = "starter",
    overrides: Overrides = None,
    seeds: Seeds = None,
    runs: list[str] | None = None,
    run_name: RunName = None,
    stories: Stories = None,
    max_steps: MaxSteps = None,
    test_stories: TestStories = None,
) -> Comparison:
    """Train both engines with the same seeds, and compare what they write with each other and with no training.

    Args:
        profile: settings to start from
        overrides: other settings that differ from the profile's, each `key=value`
        seeds: seeds that each engine is trained with; empty: 1, 2 and 3. Runs that exist are not trained again
        runs: names of trained runs to compare instead, with the same seeds for both engines
        run_name: folder of the comparison; empty: a new one
        stories: 'starter', a .parquet or .jsonl file, or a hub data set's name; empty: the profile's
        max_steps: policy updates of each training; empty: the profile's
        test_stories: stories to write titles for, at most; empty: the profile's
    """
    settings = Settings()
    overrides = filled_in(overrides, {"stories": stories, "max_steps": max_steps, "test_stories": test_stories})
    if runs:
        chosen = named_runs(runs, settings.runs_dir)
        wanted = chosen[0].profile
    else:
        chosen = await train_missing(profile, overrides, seeds or SEEDS)
        wanted = load_profile(profile, overrides)
    home = open_comparison(wanted, settings.runs_dir, run_name)
    with home.locked(), tracked(home, settings.tracking_uri, "comparison") as tracker:
        prompts = prepare_prompts_task(home.profile, settings.runs_dir / ".cache")
        compared = [compared_run(run) for run in chosen]
        # Says what is missing before anything is judged.
        Comparison(home.profile, compared, [], prompts.test)
        folders = {
            f"{run.name}@{checkpoint}": folder
            for run, one in zip(chosen, compared, strict=True)
            for checkpoint, folder in checkpoint_folders(run, one.training).items()
        }
        async with (
            no_sigterm_lost(),
            reward_server(home, settings, "reward-model", lambda waited: tell("judges", waited)) as judge,
            heldout_reward_server(home, settings) as heldout,
            serve_checkpoints(home.profile, base_model_of(home.profile), folders) as server,
        ):
            tell("judges", 1, 1)
            titles = await evaluate_titles(
                home.profile,
                prompts.test,
                endpoint=server,
                writers={"base": server.base_model_name, **server.names},
                reward_client=judge,
                heldout_client=heldout,
                baselines=True,
                on_progress=lambda done, total: tell("evaluation", done, total),
            )
        comparison = Comparison(home.profile, compared, titles, prompts.test)
        store_comparison(home, tracker, comparison, compare_command(profile, overrides, seeds or SEEDS, runs or []))
        await show_comparison(home, tracker, comparison)
        home.update(state="evaluated")
    return comparison


async def train_missing(profile: str, overrides: list[str], seeds: Sequence[int]) -> list[RunDirectory]:
    """Train every engine with every seed, unless there is a trained run of the very same settings."""
    runs_dir = Settings().runs_dir
    planned = plan(load_profile(profile, overrides), seeds, runs_dir)
    runs = []
    for number, (own, run) in enumerate(planned):
        tell("runs", number, len(planned), f"{own.engine}, seed {own.seed}")
        if run is None:
            name = await train_titles(profile, [*overrides, f"engine={own.engine}", f"seed={own.seed}"])
            run = find_run(runs_dir, run_name=name)
        runs.append(run)
    tell("runs", len(planned), len(planned))
    return runs
