"""Train a policy: prompts, reward server and trainer first, then roll out, reward and update step by step."""

from __future__ import annotations

from prefect import flow

from flows.form import (
    Engine,
    GroupSize,
    LearningRate,
    MaxSteps,
    Overrides,
    ProfileName,
    RunName,
    Seed,
    Stories,
    filled_in,
    training_fields,
)
from flows.progress import tell
from flows.termination import no_sigterm_lost
from tasks.data import prepare_prompts_task
from tasks.engines.contract import Progress
from tasks.engines.training_state import MAY_CHANGE
from tasks.health import reward_server
from tasks.titles.config import Settings, load_profile
from tasks.titles.run_directory import open_run, write_json
from tasks.tracking import (
    describe_training,
    flow_run_label,
    links,
    peak_memory_of,
    tracked,
)
from tasks.training import describe_step, train_policy, training_request
from tasks.watching import name_after, training_page


@flow(name="train", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def train_titles(
    profile: ProfileName = "starter",
    overrides: Overrides = None,
    run_name: RunName = None,
    fresh: bool = False,
    engine: Engine = None,
    stories: Stories = None,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = None,
    group_size: GroupSize = None,
    seed: Seed | None = None,
) -> str:
    """Train a policy to write titles and return the run's name.

    Args:
        profile: settings to start from
        overrides: other settings that differ from the profile's, each `key=value`
        run_name: run to continue or to start; empty: the newest unfinished run of this very profile, or a new one
        fresh: start a new run even where one could be continued
        engine: what trains, art (our loop, OpenPipe ART) or trl (TRL's GRPOTrainer); empty: the profile's
        stories: 'starter', a .parquet or .jsonl file, or a hub data set's name; empty: the profile's
        max_steps: policy updates; empty: the profile's
        learning_rate: of the engine that trains; empty: the profile's
        group_size: titles per prompt; empty: the profile's
        seed: decides the order of stories and the sampling; empty: the profile's
    """
    settings = Settings()
    fields = training_fields(
        engine=engine,
        stories=stories,
        max_steps=max_steps,
        learning_rate=learning_rate,
        group_size=group_size,
        seed=seed,
    )
    run = open_run(
        load_profile(profile, filled_in(overrides, fields)),
        runs_dir=settings.runs_dir,
        run_name=run_name,
        fresh=fresh,
        until="trained",
        may_change=MAY_CHANGE,
    )
    await name_after(run)
    with run.locked(), tracked(run, settings.tracking_uri) as tracker:
        tell("stories", 0)
        prompts = prepare_prompts_task(
            run.profile, settings.runs_dir / ".cache", lambda done, total: tell("stories", done, total)
        )
        tell("stories", 1, 1, prompts.report.as_line())
        write_json(run.path / "stories.json", prompts.report.as_dict())
        async with (
            no_sigterm_lost(),
            reward_server(run, settings, "reward-model", lambda waited: tell("reward server", waited)) as judge,
        ):
            tell("reward server", 1, 1)
            request = training_request(run, prompts, judge.base_url, settings)
            tell("training", 0, run.profile.max_steps, "starting")
            async with training_page(run, links(run, tracker), tell_step) as listener:
                with peak_memory_of(run):
                    result = await train_policy(
                        request,
                        tracker=tracker,
                        on_progress=listener,
                        dask_address=settings.dask_scheduler_address,
                    )
        describe_training(run, tracker, result)
        run.update(state="trained")
    return run.name


def tell_step(progress: Progress) -> None:
    """Tell the command line's bars of a step."""
    tell("training", progress.step, progress.max_steps, describe_step(progress))
