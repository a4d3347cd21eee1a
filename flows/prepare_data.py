"""Prepare the data: read the stories, filter and tokenise them, and say what became of every row."""

from __future__ import annotations

from prefect import flow

from flows.form import MinimumScore, Overrides, ProfileName, Stories, filled_in
from flows.progress import tell
from tasks.data import prepare_prompts_task
from tasks.titles.config import Settings, load_profile
from tasks.tracking import flow_run_label


@flow(name="prepare-data", flow_run_name=flow_run_label, persist_result=False, retries=0)
def prepare_data(
    profile: ProfileName = "starter",
    stories: Stories = None,
    minimum_score: MinimumScore = None,
    overrides: Overrides = None,
) -> str:
    """Read, filter and tokenise the stories, and keep the prompts for trainings to come.

    The artifact `stories` shows what became of every row.

    Args:
        profile: settings to start from
        stories: 'starter', a .parquet or .jsonl file, or a hub data set's name; empty: the profile's
        minimum_score: stories below this many upvotes are no prompts; empty: the profile's
        overrides: other settings that differ from the profile's, each `key=value`
    """
    wanted = load_profile(profile, filled_in(overrides, {"stories": stories, "minimum_score": minimum_score}))
    tell("stories", 0)
    prompts = prepare_prompts_task(
        wanted, Settings().runs_dir / ".cache", lambda done, total: tell("stories", done, total)
    )
    line = prompts.report.as_line()
    tell("stories", 1, 1, line)
    return line
