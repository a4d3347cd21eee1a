"""Evaluation as Prefect tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from reward_server.client import RewardClient
from tasks.engines.tracker import MlflowTracker
from tasks.titles.config import Profile
from tasks.titles.evaluation import EvaluatedTitle, Evaluator
from tasks.titles.reward_model_quality import reward_model_quality
from tasks.titles.rollout import Endpoint
from tasks.titles.ruler import Ruler, ruler_of
from tasks.titles.run_directory import RunDirectory, write_json, write_text
from tasks.titles.run_note import run_note
from tasks.titles.sources import load_stories
from tasks.titles.story import Prompt
from tasks.titles.summary import Evaluation, gain_sentence, markdown, markdown_table, metrics, table_rows


@task(name="evaluate titles", cache_policy=NO_CACHE, persist_result=False)
async def evaluate_titles(
    profile: Profile,
    prompts: Sequence[Prompt],
    *,
    endpoint: Endpoint,
    writers: Mapping[str, str],
    reward_client: RewardClient,
    heldout_client: RewardClient | None,
    on_progress: Callable[[int, int], None],
    baselines: bool = False,
) -> list[EvaluatedTitle]:
    """Have every writer's titles of the test stories and the human ones written and judged.

    With `baselines` come those that need no training: first sentences, and the best of several base titles.
    """
    async with Evaluator(
        profile,
        endpoint=endpoint,
        writers=writers,
        reward_client=reward_client,
        heldout_client=heldout_client,
        baselines=baselines,
    ) as evaluator:
        titles = await evaluator.evaluate(prompts, on_progress)
    failed = sum(title.failure is not None for title in titles)
    get_run_logger().info("%d titles of %d stories, %d without a judgement", len(titles), len(prompts), failed)
    return titles


@task(name="note what is measured with", cache_policy=NO_CACHE, persist_result=False)
async def measured_with(profile: Profile, prompts: Sequence[Prompt], client: RewardClient) -> Ruler:
    """Return what titles of these prompts are measured with, as the reward server stands now."""
    ruler = ruler_of(profile, prompts, (await client.health()).version)
    get_run_logger().info("Measured with %s", ruler.as_dict())
    return ruler


@task(name="compare reward model with upvotes", cache_policy=NO_CACHE, persist_result=False)
async def measure_reward_model(source: str, client: RewardClient) -> dict[str, float] | None:
    """Compare the reward model's scores of human titles with the upvotes that they got."""
    quality = await reward_model_quality(load_stories(source).stories, client)
    get_run_logger().info("Reward model on the test split: %s", quality)
    return quality


@task(name="store evaluation", cache_policy=NO_CACHE, persist_result=False)
def store_evaluation(run: RunDirectory, tracker: MlflowTracker, evaluation: Evaluation) -> None:
    """Write summary.json and titles.jsonl into the run's folder, and the same into MLflow."""
    rows = [title.as_row() for title in evaluation.titles]
    write_text(run.path / "titles.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(run.summary_path, evaluation.summary())
    write_text(run.path / "report.md", markdown(evaluation))
    tracker.log_titles("test", rows)
    tracker.log_checkpoint_metrics(evaluation.training.best_step, metrics(evaluation, "best"))
    if evaluation.training.steps != evaluation.training.best_step:
        tracker.log_checkpoint_metrics(evaluation.training.steps, metrics(evaluation, "last"))
    for name in ("summary.json", "report.md"):
        tracker.log_file(run.path / name)
    report = f"Titles and all figures: [report.md]({tracker.page('report.md')})."
    results = [gain_sentence(evaluation), markdown_table(table_rows(evaluation)), report]
    tracker.describe(run_note(run, "training", results))
    get_run_logger().info("Figures in %s", run.summary_path)
