"""What the Prefect UI shows of a run: its progress, its results and the way to MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import task
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from tasks.engines.contract import Progress, ProgressListener
from tasks.engines.tracker import MlflowTracker
from tasks.titles.peak_memory import PeakMemory
from tasks.titles.run_directory import RunDirectory, RunRecord
from tasks.titles.summary import Evaluation, markdown, sample_rows, table_rows

logger = logging.getLogger(__name__)

MLFLOW_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens unless told otherwise."""


def flow_run_label() -> str:
    """Return the name of the present flow run: what it does, and to which run (or with which profile)."""
    given = flow_run.parameters
    return f"{flow_run.flow_name}-{given.get('run_name') or given.get('profile') or 'newest'}"


@contextmanager
def tracked(run: RunDirectory, tracking_uri: str) -> Iterator[MlflowTracker]:
    """Start the run's MLflow run, or reopen it, and set its status by how the context is left.

    Raises `ServiceUnavailable` where MLflow cannot be reached at the start.
    """
    record = run.record()
    tracker = MlflowTracker.open(
        run.profile, run_name=run.name, tracking_uri=tracking_uri, resume_run_id=record.mlflow_run_id
    )
    run.update(mlflow_run_id=tracker.run_id, mlflow_experiment_id=tracker.experiment_id)
    try:
        yield tracker
    except Exception:
        tracker.finish("FAILED")
        raise
    except BaseException:
        # Interrupted or cancelled: the same command continues it.
        tracker.finish("KILLED")
        raise
    tracker.finish("FINISHED")


@contextmanager
def peak_memory_of(run: RunDirectory) -> Iterator[None]:
    """Keep the highest memory of this process and its children in the run's record, over all sittings."""
    memory = PeakMemory()
    try:
        with memory:
            yield
    finally:
        run.update(peak_memory_mb=max(memory.megabytes, run.record().peak_memory_mb or 0.0))


def mlflow_command(uri: str) -> str:
    """Return the command that opens the MLflow UI on `uri`, or its address where it is a server."""
    if uri.startswith(("http://", "https://")):
        return uri
    return f"mlflow ui --backend-store-uri {uri}"


async def follow_training(run: RunDirectory, tracker: MlflowTracker, listener: ProgressListener) -> ProgressListener:
    """Create a progress artifact and return a listener that keeps it up to date and tells `listener`.

    What Prefect does not take is logged and harms nothing.
    """
    artifact_id = None
    try:
        artifact_id = await acreate_progress_artifact(
            progress=0.0,
            key="training",
            description=f"Training {run.name}. In MLflow: `{mlflow_command(tracker.tracking_uri)}`",
        )
    except Exception as error:
        logger.warning("Prefect did not take the progress artifact: %s", error)

    def on_progress(progress: Progress) -> None:
        listener(progress)
        if artifact_id is None:
            return
        try:
            update_progress_artifact(artifact_id, 100.0 * progress.step / progress.max_steps, _sync=True)  # type: ignore[call-arg]
        except Exception as error:
            logger.warning("Prefect did not take the progress of step %d: %s", progress.step, error)

    return on_progress


@task(name="show validation titles", cache_policy=NO_CACHE, persist_result=False)
async def show_validation_titles(run: RunDirectory) -> None:
    """Keep a training's last validation titles as a table artifact."""
    files = sorted((run.path / "validation").glob("*.json"))
    if files:
        rows = json.loads(files[-1].read_text(encoding="utf-8"))
        await acreate_table_artifact(rows, key="validation-titles", description=f"Last validation of {run.name}")


@task(name="show results", cache_policy=NO_CACHE, persist_result=False)
async def show_results(run: RunDirectory, tracker: MlflowTracker, evaluation: Evaluation) -> None:
    """Keep the report as a Markdown artifact that leads to MLflow, and its tables as table artifacts."""
    await acreate_markdown_artifact(
        markdown(evaluation, links(run, tracker)), key="report", description=f"Evaluation of {run.name}"
    )
    await acreate_table_artifact(table_rows(evaluation), key="results", description=f"Test figures of {run.name}")
    await acreate_table_artifact(
        sample_rows(evaluation, count=20), key="test-titles", description=f"Greedy test titles of {run.name}"
    )


def links(run: RunDirectory, tracker: MlflowTracker) -> list[str]:
    """Return lines of Markdown that lead to the run in MLflow and on disk."""
    page = mlflow_page(run.record())
    uri = tracker.tracking_uri
    if uri.startswith(("http://", "https://")):
        mlflow = f"MLflow: [run {run.name}]({uri.rstrip('/')}/{page})"
    else:
        mlflow = f"MLflow: `{mlflow_command(uri)}`, then [run {run.name}]({MLFLOW_UI}/{page})"
    return [mlflow, f"Files: `{run.path.resolve()}`"]


def mlflow_page(record: RunRecord) -> str:
    """Return the run's page within MLflow's UI."""
    return f"#/experiments/{record.mlflow_experiment_id}/runs/{record.mlflow_run_id}"
