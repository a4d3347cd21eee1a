"""The Prefect task that turns a profile's stories into prompts."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.titles.config import Profile
from tasks.titles.prepare import PreparedPrompts, prepare_prompts
from tasks.titles.tokens import Progress


# Prefect's key would be made of the parameters, and a file may change under an unchanged name: prepare_prompts
# keeps a cache of its own, by content.
@task(name="prepare prompts", cache_policy=NO_CACHE)
def prepare_prompts_task(profile: Profile, cache_dir: Path, progress: Progress | None = None) -> PreparedPrompts:
    """Load, filter and tokenise the stories; the report becomes the artifact `stories`."""
    prepared = prepare_prompts(profile, cache_dir=cache_dir, progress=progress)
    report = prepared.report
    logger = get_run_logger()
    logger.info("%d rows in %s, %d dropped", report.total_came, report.source, report.total_dropped)
    logger.info("%d train, %d val, %d test prompts", len(prepared.train), len(prepared.val), len(prepared.test))
    create_markdown_artifact(key="stories", markdown=report.as_markdown(), description="Stories in, prompts out")
    return prepared
