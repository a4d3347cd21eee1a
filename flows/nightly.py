"""Every night: fresh stories, a training, its evaluation, and a new champion only where it is better."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect import flow
from prefect.runtime import flow_run

from flows.evaluate import evaluate_run
from flows.form import (
    Engine,
    GroupSize,
    LearningRate,
    MaxSteps,
    Overrides,
    ProfileName,
    RunName,
    Stories,
    filled_in,
    training_fields,
)
from flows.prepare_data import prepare_data
from flows.train import train_titles
from tasks.titles.config import Profile, load_profile
from tasks.tracking import flow_run_label


@flow(name="nightly", flow_run_name=flow_run_label, persist_result=False, retries=0)
async def train_and_promote(
    profile: ProfileName = "starter",
    engine: Engine = None,
    stories: Stories = None,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = None,
    group_size: GroupSize = None,
    run_name: RunName = None,
    overrides: Overrides = None,
) -> str:
    """Train on fresh stories, evaluate, and promote the best checkpoint where it beats the present champion.

    Started again for the same day it continues that day's run.

    Args:
        profile: settings to start from
        engine: what trains, art (our loop, OpenPipe ART) or trl (TRL's GRPOTrainer); empty: the profile's
        stories: 'starter', a .parquet or .jsonl file, or a hub data set's name; empty: the profile's
        max_steps: policy updates; empty: the profile's
        learning_rate: of the engine that trains; empty: the profile's
        group_size: titles per prompt; empty: the profile's
        run_name: run to continue or to start; empty: nightly, profile, engine and the day that it is scheduled for
        overrides: other settings that differ from the profile's, each `key=value`
    """
    from flows.promote import promote_run

    fields = training_fields(
        engine=engine, stories=stories, max_steps=max_steps, learning_rate=learning_rate, group_size=group_size
    )
    changes = filled_in(overrides, fields)
    name = run_name or nightly_name(load_profile(profile, changes), flow_run.scheduled_start_time or datetime.now(UTC))
    prepare_data(profile, overrides=changes)
    await train_titles(profile, changes, name)
    await evaluate_run(name)
    await promote_run(name)
    return name


def nightly_name(profile: Profile, scheduled: datetime) -> str:
    """Return the name of a night's run: the same for all that are scheduled for one day (UTC)."""
    return f"nightly-{profile.name}-{profile.engine}-{scheduled.astimezone(UTC).date().isoformat()}"
