"""What the Prefect UI shows of a run: its progress, its results and the way to MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import task
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from tasks.engines.contract import TrainingResult
from tasks.engines.system_metrics import system_metrics
from tasks.engines.tracker import MlflowTracker, run_page
from tasks.titles.metric_names import VAL_REWARD_MEAN
from tasks.titles.peak_memory import PeakMemory
from tasks.titles.run_directory import RunDirectory, RunRecord
from tasks.titles.run_note import Kind, run_note, trained_sentence
from tasks.titles.summary import Evaluation, markdown, sample_rows, table_rows

MLFLOW_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens unless told otherwise."""


def flow_run_label() -> str:
    """Return the name of the present flow run: what it does, and to which run (or with which profile)."""
    given = flow_run.parameters
    return f"{flow_run.flow_name}-{given.get('run_name') or given.get('profile') or 'newest'}"


@contextmanager
def tracked(run: RunDirectory, tracking_uri: str, kind: Kind = "training") -> Iterator[MlflowTracker]:
    """Start the run's MLflow run, or reopen it, and set its status by how the context is left.

    Meanwhile it records what the machine does.

    Raises `ServiceUnavailable` where MLflow cannot be reached at the start.
    """
    # The flow run's page shows it from this level on; under a worker nobody else has set one.
    logging.getLogger("tasks").setLevel(logging.INFO)
    record = run.record()
    tracker = MlflowTracker.open(
        run.profile,
        run_name=run.name,
        tracking_uri=tracking_uri,
        kind=kind,
        note=run_note(run, kind),
        resume_run_id=record.mlflow_run_id,
    )
    run.update(mlflow_run_id=tracker.run_id, mlflow_experiment_id=tracker.experiment_id)
    try:
        with system_metrics(tracker.run_id, tracking_uri):
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


def describe_training(run: RunDirectory, tracker: MlflowTracker, result: TrainingResult) -> None:
    """Store the reward curve, and say on the run's page in MLflow what its training came to."""
    tracker.log_reward_curve(result.best_step)
    validation = tracker.history().get(VAL_REWARD_MEAN, [])
    tracker.describe(run_note(run, "training", [trained_sentence(result.steps, result.best_step, validation)]))


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
    return run_page(record.mlflow_experiment_id, record.mlflow_run_id)
