"""One MLflow run per training: parameters, metrics, titles, checkpoints and the reward curve.

At the start everything must work, or the run does not begin. While training nothing here raises: what
could not be stored is kept in order, logged as a warning, and tried again with the next call.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tasks.engines.reward_curve import draw_reward_curve
from tasks.engines.system_metrics import PREFIX as SYSTEM_PREFIX
from tasks.titles.config import Profile
from tasks.titles.errors import ServiceUnavailable
from tasks.titles.run_note import Kind

logger = logging.getLogger(__name__)

EXPERIMENT = "hn-titles"
# MLflow's own names, written out: it is imported only once a run begins.
MLFLOW_PARENT_RUN_ID = "mlflow.parentRunId"
MLFLOW_RUN_NOTE = "mlflow.note.content"
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's own habit is seven retries of two minutes each, in which training would stand still.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
# The project reports to nobody; MLflow's own usage reports are switched off with it.
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}
# After a failure, calls only queue for this long: a server that hangs must not cost every step its time-out.
RETRY_PAUSE_S = 30.0
STEP_PARAM = "step"
"""The parameter of a checkpoint's LoggedModel that says which step it is."""
REPORT = "report.html"
"""The artifact of a comparison that the descriptions of its runs lead to."""
_REPORT_LINE = "\n\nCompared with others: "


class MlflowTracker:
    """The MLflow side of one training; implements `contract.RunTracker`.

    A (metric, step) is stored once: a training that was killed and repeats some steps leaves what the
    history holds already as it is.
    """

    def __init__(
        self, client: Any, *, tracking_uri: str, experiment_id: str, run_id: str, retry_pause_s: float
    ) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.tracking_uri = tracking_uri
        self._client = client
        self._retry_pause_s = retry_pause_s
        self._retry_at = 0.0
        self._pending: deque[tuple[str, Callable[[], None]]] = deque()
        # (name, step) -> (value, timestamp in ms): what the run's history holds or will hold.
        self._metrics: dict[tuple[str, int], tuple[float, int]] = {}
        # step -> (model id, whether it is complete)
        self._models: dict[int, tuple[str, bool]] = {}

    @classmethod
    def open(
        cls,
        profile: Profile,
        *,
        run_name: str,
        tracking_uri: str,
        kind: Kind = "training",
        note: str = "",
        resume_run_id: str | None = None,
        retry_pause_s: float = RETRY_PAUSE_S,
    ) -> MlflowTracker:
        """Start an MLflow run described by `note`, or reopen `resume_run_id` and read what it holds.

        Raises `ServiceUnavailable` where the tracking server cannot be reached, refuses, or knows no such run.
        """
        for key, value in {**_PATIENCE, **_QUIET}.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient

        try:
            _prepare_folders(tracking_uri)
            client = MlflowClient(tracking_uri=tracking_uri)
            experiment_id = _experiment(client, tracking_uri)
            if resume_run_id is None:
                run_id = _new_run(client, experiment_id, profile, run_name, kind, note)
            else:
                run_id = resume_run_id
                client.update_run(run_id, status="RUNNING")
            tracker = cls(
                client,
                tracking_uri=tracking_uri,
                experiment_id=experiment_id,
                run_id=run_id,
                retry_pause_s=retry_pause_s,
            )
            if resume_run_id is not None:
                tracker._read_history()
            return tracker
        except Exception as error:
            what = f"reopen run {resume_run_id}" if resume_run_id else "start a run"
            raise ServiceUnavailable(
                f"MLflow at {tracking_uri} could not {what}: {_first_line(error)}\n"
                "Start the tracking server, or set MLFLOW_TRACKING_URI to one that runs; "
                "unset it to keep runs in a SQLite file beside them."
            ) from error

    # --- what training calls -------------------------------------------------------------------

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the metrics of one step; a (metric, step) that is stored already is left alone."""
        now = _milliseconds()
        new = {name: float(value) for name, value in metrics.items() if (name, step) not in self._metrics}
        if not new:
            return
        self._metrics.update({(name, step): (value, now) for name, value in new.items()})
        # The time is fixed here, so that a repeated attempt writes the very same rows and MLflow keeps one.
        rows = [self._row(name, step) for name in new]
        self._store(f"metrics of step {step}", lambda: self._client.log_batch(self.run_id, metrics=rows))

    def log_titles(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store titles as the MLflow table `titles/<name>.json`, replacing one of that name."""
        if rows:
            kept = [dict(row) for row in rows]
            self._store(f"titles {name}", lambda: self._write_table(f"titles/{name}.json", kept))

    def log_checkpoint(self, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
        """Store a kept checkpoint as a LoggedModel with what it was validated to and, as its artifact, its adapter.

        `metrics` are those of its step, `folder` holds the adapter.
        """
        if self._models.get(step, ("", False))[1]:
            return
        self.log_metrics(step, metrics)
        # What the step took and was trained on is the run's; the list of models has columns for what a model is worth.
        names = [name for name in metrics if name.startswith("val/")]
        self._store(f"checkpoint {step}", lambda: self._write_checkpoint(step, folder, names))

    # --- what comes after training -------------------------------------------------------------

    def log_checkpoint_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics (of the evaluation, say) to checkpoint `step`'s LoggedModel and to the run."""
        self.log_metrics(step, metrics)
        names = list(metrics)

        def write() -> None:
            if step in self._models:
                self._write_model_metrics(self._models[step][0], step, names)

        self._store(f"metrics of checkpoint {step}", write)

    def log_file(self, path: Path) -> None:
        """Store a file as an artifact under its own name, replacing one of that name."""
        self._store(path.name, lambda: self._client.log_artifact(self.run_id, str(path)))

    def log_reward_curve(self, best_step: int | None = None) -> None:
        """Store the reward curve as the picture `reward_curve.png`."""

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "reward_curve.png"
                if draw_reward_curve(self.history(), path, best_step=best_step):
                    self._client.log_artifact(self.run_id, str(path))

        self._store("reward curve", write)

    def describe(self, note: str) -> None:
        """Replace the run's description, Markdown; what it was compared in stays in it."""

        def write() -> None:
            parent = self._client.get_run(self.run_id).data.tags.get(MLFLOW_PARENT_RUN_ID)
            self._write_note(self.run_id, note, parent)

        self._store("description", write)

    def adopt(self, run_ids: Sequence[str]) -> None:
        """Make runs the children of this one, a comparison, and lead from their descriptions to its report.

        A run that another comparison had is this one's from now on.
        """
        for run_id in run_ids:
            self._store(f"child {run_id}", partial(self._write_parent, run_id))

    def page(self, artifact: str = "") -> str:
        """Return the link, from any page of MLflow, to the run or one of its artifacts."""
        return run_page(self.experiment_id, self.run_id, artifact)

    def finish(self, status: RunStatus) -> None:
        """Set the run's status and try once more to store what is pending."""
        self._retry_at = 0.0
        self._store("run status", lambda: self._client.set_terminated(self.run_id, status=status))
        if self._pending:
            logger.warning(
                "%d things never reached MLflow at %s, first %s; the run's own metrics.jsonl has all metrics",
                len(self._pending),
                self.tracking_uri,
                self._pending[0][0],
            )

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Return every metric's (step, value) pairs in the order of steps."""
        series: dict[str, list[tuple[int, float]]] = {}
        for (name, step), (value, _) in sorted(self._metrics.items()):
            series.setdefault(name, []).append((step, value))
        return series

    # --- storing -------------------------------------------------------------------------------

    def _store(self, what: str, write: Callable[[], None]) -> None:
        """Queue `write` and work off the queue in order, as far as it goes."""
        self._pending.append((what, write))
        if time.monotonic() < self._retry_at:
            return
        while self._pending:
            oldest, attempt = self._pending[0]
            try:
                attempt()
            except Exception as error:
                # Whatever MLflow raises here (its own, requests', sqlite's), training goes on.
                if _is_refusal(error):
                    logger.warning("MLflow refused %s, which is left out: %s", oldest, _first_line(error))
                    self._pending.popleft()
                    continue
                self._retry_at = time.monotonic() + self._retry_pause_s
                logger.warning(
                    "MLflow at %s did not store %s (%s); %d waiting, tried again later",
                    self.tracking_uri,
                    oldest,
                    _first_line(error),
                    len(self._pending),
                )
                return
            self._pending.popleft()

    def _row(self, name: str, step: int, model_id: str | None = None) -> Any:
        from mlflow.entities import Metric

        value, timestamp = self._metrics[(name, step)]
        return Metric(name, value, timestamp, step, model_id=model_id)

    def _write_table(self, path: str, rows: list[dict[str, Any]]) -> None:
        import pandas
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        # MLflow's log_table appends to a table that exists, so a repeated validation would double its rows.
        folder, _, file_name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / file_name
            pandas.DataFrame(rows).to_json(local, orient="split", index=False, date_format="iso")
            self._client.log_artifact(self.run_id, str(local), folder)
        tables = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in tables:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))

    def _write_parent(self, run_id: str) -> None:
        run = self._client.get_run(run_id)
        self._client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, self.run_id)
        self._write_note(run_id, run.data.tags.get(MLFLOW_RUN_NOTE, ""), self.run_id)

    def _write_note(self, run_id: str, note: str, parent: str | None) -> None:
        note = note.partition(_REPORT_LINE)[0]
        if parent:
            note += f"{_REPORT_LINE}[report]({run_page(self.experiment_id, parent, REPORT)})."
        self._client.set_tag(run_id, MLFLOW_RUN_NOTE, note)

    def _write_checkpoint(self, step: int, folder: Path, names: list[str]) -> None:
        if step not in self._models:
            run = self._client.get_run(self.run_id)
            model = self._client.create_logged_model(
                self.experiment_id,
                name=f"{run.info.run_name}-step-{step:04d}",
                source_run_id=self.run_id,
                model_type="peft-adapter",
                params={
                    STEP_PARAM: str(step),
                    "engine": run.data.params.get("engine", ""),
                    "base_model": run.data.params.get("base_model", ""),
                },
            )
            self._models[step] = (model.model_id, False)
        model_id = self._models[step][0]
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            self._client.log_model_artifact(model_id, str(folder / name))
        self._write_model_metrics(model_id, step, names)
        self._client.finalize_logged_model(model_id, "READY")
        self._models[step] = (model_id, True)

    def _write_model_metrics(self, model_id: str, step: int, names: list[str]) -> None:
        # Rows with the value and the time that the run holds already are no second entry in its history.
        metrics = [self._row(name, step, model_id) for name in names]
        self._client.log_batch(self.run_id, metrics=metrics)

    def _read_history(self) -> None:
        run = self._client.get_run(self.run_id)
        for name in run.data.metrics:
            if name.startswith(SYSTEM_PREFIX):
                continue
            for row in self._client.get_metric_history(self.run_id, name):
                self._metrics.setdefault((name, row.step), (row.value, row.timestamp))
        models = self._client.search_logged_models(
            [self.experiment_id], filter_string=f"source_run_id = '{self.run_id}'"
        )
        for model in models:
            if STEP_PARAM in model.params:
                self._models[int(model.params[STEP_PARAM])] = (model.model_id, str(model.status) == "READY")


def _is_refusal(error: Exception) -> bool:
    """Return whether the same call would fail for ever: bad input, a run deleted meanwhile, a pruned folder."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
    return isinstance(error, FileNotFoundError | TypeError | ValueError)


def _experiment(client: Any, tracking_uri: str) -> str:
    existing = client.get_experiment_by_name(EXPERIMENT)
    if existing is not None:
        return str(existing.experiment_id)
    database = sqlite_file(tracking_uri)
    artifacts = (database.parent / "mlartifacts").as_uri() if database else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))


def _new_run(client: Any, experiment_id: str, profile: Profile, run_name: str, kind: Kind, note: str) -> str:
    from mlflow.entities import Param

    values = profile.model_dump(mode="json")
    tags = {"kind": kind, "profile": profile.name, "mlflow.source.name": "hn-titles", MLFLOW_RUN_NOTE: note}
    if kind == "training":
        tags["engine"] = profile.engine
    run_id = str(client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
    params = [Param(key, str(value)) for key, value in flatten(values).items()]
    client.log_batch(run_id, params=params)
    client.log_dict(run_id, values, "profile.json")
    return run_id


def run_page(experiment_id: str | None, run_id: str | None, artifact: str = "") -> str:
    """Return the page of a run, or of one of its artifacts, within MLflow's UI."""
    within = f"/artifacts/{artifact}" if artifact else ""
    # A browser that is new to MLflow sees its pages for agents otherwise, which have neither runs nor models.
    return f"#/experiments/{experiment_id}/runs/{run_id}{within}?workflowType=machine_learning"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def sqlite_file(tracking_uri: str) -> Path | None:
    """Return the database file that a tracking URI names, None where it names no SQLite database."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)).resolve() if tracking_uri.startswith(prefix) else None


def _prepare_folders(tracking_uri: str) -> None:
    database = sqlite_file(tracking_uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)


def _milliseconds() -> int:
    return math.floor(time.time() * 1000)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
