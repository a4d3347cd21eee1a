"""The comparison of both engines as Prefect tasks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from prefect import get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE

from tasks.engines.device import device_name
from tasks.engines.resume import journal_of
from tasks.engines.tracker import REPORT, MlflowTracker
from tasks.report.page import render
from tasks.titles.comparison import ComparedRun, Comparison
from tasks.titles.comparison_report import markdown, metrics, report, result_rows
from tasks.titles.conclusions import conclusions
from tasks.titles.config import EngineName
from tasks.titles.curves import curve, time_per_step
from tasks.titles.run_directory import RunDirectory, write_json, write_text
from tasks.titles.run_note import run_note
from tasks.titles.summary import markdown_table
from tasks.tracking import links
from tasks.training import training_facts

PACKAGES: dict[EngineName, str] = {"art": "openpipe-art", "trl": "trl"}


def compare_command(profile: str, overrides: Sequence[str], seeds: Sequence[int], runs: Sequence[str]) -> str:
    """Return the command line that makes the same comparison."""
    parts = ["hn-titles", "compare"]
    for run in runs:
        parts += ["--run", run]
    if not runs:
        parts += ["--profile", profile, *(part for override in overrides for part in ("--set", override))]
        parts += ["--seeds", ",".join(map(str, seeds))]
    return shlex.join(parts)


def compared_run(run: RunDirectory) -> ComparedRun:
    """Return what the comparison needs of a trained run; raise `CheckpointError` where it is not trained."""
    rows = journal_of(run.path).rows()
    return ComparedRun(
        run_name=run.name,
        profile=run.profile,
        training=training_facts(run),
        curve=curve(rows, run.profile),
        time_per_step=time_per_step(rows),
        peak_memory_mb=run.record().peak_memory_mb,
    )


@task(name="store comparison", cache_policy=NO_CACHE, persist_result=False)
def store_comparison(home: RunDirectory, tracker: MlflowTracker, comparison: Comparison, command: str) -> None:
    """Write report.html, report.json and titles.jsonl into the comparison's folder and into MLflow."""
    rows = [title.as_row() for title in comparison.titles]
    write_text(home.path / "titles.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    figures = report(
        comparison,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_name(home.profile.device),
        versions={engine: version(package) for engine, package in PACKAGES.items()},
    )
    write_json(home.path / "report.json", figures)
    write_text(home.report_page, render(figures))
    tracker.log_metrics(0, metrics(comparison))
    tracker.log_titles("test", rows)
    for path in (home.report_page, home.path / "report.json"):
        tracker.log_file(path)
    results = [
        f"**[Open the report]({tracker.page(REPORT)})**",
        "\n".join(f"* {conclusion}" for conclusion in conclusions(comparison)),
        markdown_table(result_rows(comparison)),
    ]
    tracker.describe(run_note(home, "comparison", results))
    tracker.adopt([run.training.mlflow_run_id for run in comparison.runs])
    get_run_logger().info("Report in %s", home.report_page)


@task(name="show comparison", cache_policy=NO_CACHE, persist_result=False)
async def show_comparison(home: RunDirectory, tracker: MlflowTracker, comparison: Comparison) -> None:
    """Keep the comparison as a Markdown artifact that leads to the report, and its results as a table artifact."""
    where = [f"Report: `{home.report_page.resolve()}`", *links(home, tracker)]
    await acreate_markdown_artifact(
        markdown(comparison, where),
        key="comparison",
        description=f"ART and TRL on {len(comparison.prompts)} test stories",
    )
    await acreate_table_artifact(
        result_rows(comparison), key="comparison-results", description="Test figures by method"
    )
