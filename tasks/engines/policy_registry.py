"""Checkpoints in MLflow's registry: versions of one model, each a LoggedModel with its evaluation, one the champion."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.engines.tracker import STEP_PARAM, sqlite_file
from tasks.titles.errors import ServiceUnavailable
from tasks.titles.promotion import CHAMPION, JudgedPolicy, Version, read_policy
from tasks.titles.run_directory import write_json

EVALUATION = "evaluation.json"
"""The file beside the adapter that says what a version earned, and measured with what."""


class PolicyRegistry:
    """The versions of one registered model. Every method raises `ServiceUnavailable` where MLflow does not answer."""

    def __init__(self, name: str, tracking_uri: str) -> None:
        for key, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}.items():
            os.environ.setdefault(key, value)
        self.name = name
        self.tracking_uri = tracking_uri
        self._known_client: Any = None

    def champion(self) -> Version | None:
        """Return the champion with its evaluation, None where there is none (or no MLflow database yet)."""
        database = sqlite_file(self.tracking_uri)
        if database is not None and not database.exists():
            return None
        with self._asked("say which version is the champion"):
            number = self._aliases().get(CHAMPION)
            if number is None:
                return None
            with tempfile.TemporaryDirectory() as folder:
                path = self._download(str(number), Path(folder), EVALUATION)
                return Version(self.name, str(number), read_policy(path))

    def register(self, run_id: str, policy: JudgedPolicy) -> Version:
        """Register the LoggedModel of a run's checkpoint as a version, once, and store its newest evaluation."""
        with self._asked(f"register {policy.name}"):
            model = self._logged_model(run_id, policy.step)
            if not self._client.search_registered_models(filter_string=f"name = '{self.name}'"):
                self._client.create_registered_model(self.name, description="Writes titles for Hacker News.")
            self._store(model.model_id, policy)
            versions = self._client.search_model_versions(f"name = '{self.name}' and run_id = '{run_id}'")
            known = [version for version in versions if version.tags.get(STEP_PARAM) == str(policy.step)]
            if known:
                return Version(self.name, str(known[0].version), policy)
            version = self._client.create_model_version(
                self.name,
                model.artifact_location,
                run_id=run_id,
                model_id=model.model_id,
                tags={
                    "run": policy.run_name,
                    STEP_PARAM: str(policy.step),
                    "base_model": policy.profile.base_model,
                    "logged_model": model.model_id,
                },
                description=f"Adapter of {policy.profile.base_model}: {policy.name}.",
            )
            return Version(self.name, str(version.version), policy)

    def store_evaluation(self, version: Version) -> None:
        """Replace the stored evaluation of a version."""
        with self._asked(f"store the evaluation of {version.uri}"):
            found = self._client.get_model_version(self.name, version.number)
            self._store(found.tags["logged_model"], version.policy)

    def describe(self, version: Version, text: str) -> None:
        """Replace the description of a version."""
        with self._asked(f"describe {version.uri}"):
            self._client.update_model_version(self.name, version.number, description=text)

    def crown(self, version: Version, *, instead_of: Version | None, lock_folder: Path) -> bool:
        """Move the alias `champion` to `version` if it still stands at `instead_of`; return whether it did.

        MLflow has no such step that nothing can come between: a file in `lock_folder` keeps other processes of this
        machine out, and promotions on other machines have the milliseconds between asking and moving.
        """
        lock_folder.mkdir(parents=True, exist_ok=True)
        with (
            (lock_folder / f"champion-{self.name}.lock").open("w") as lock,
            self._asked(f"make {version.uri} the champion"),
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            present = self._aliases().get(CHAMPION)
            if (present and str(present)) != (instead_of and instead_of.number):
                return False
            self._client.set_registered_model_alias(self.name, CHAMPION, version.number)
            return True

    @contextmanager
    def adapter(self, version: Version) -> Iterator[Path]:
        """Yield a folder with a copy of the version's adapter; it goes with the context."""
        with tempfile.TemporaryDirectory(prefix="hn-titles-") as scratch:
            with self._asked(f"give the files of {version.uri}"):
                folder = self._download(version.number, Path(scratch))
            yield folder

    # --- MLflow --------------------------------------------------------------------------------

    @property
    def _client(self) -> Any:
        if self._known_client is None:
            from mlflow import MlflowClient

            self._known_client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
        return self._known_client

    def _aliases(self) -> dict[str, Any]:
        models = self._client.search_registered_models(filter_string=f"name = '{self.name}'")
        return dict(models[0].aliases) if models else {}

    def _logged_model(self, run_id: str, step: int) -> Any:
        run = self._client.get_run(run_id)
        models = self._client.search_logged_models(
            [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'", max_results=1000
        )
        for model in models:
            if model.params.get(STEP_PARAM) == str(step) and str(model.status) == "READY":
                return model
        raise ServiceUnavailable(
            f"MLflow at {self.tracking_uri} holds no complete LoggedModel of step {step} of run {run_id}."
        )

    def _store(self, model_id: str, policy: JudgedPolicy) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / EVALUATION
            write_json(path, policy.as_dict())
            self._client.log_model_artifact(model_id, str(path))

    def _download(self, number: str, folder: Path, file: str = "") -> Path:
        from mlflow.artifacts import download_artifacts

        source = self._client.get_model_version_download_uri(self.name, number).rstrip("/")
        uri = f"{source}/{file}" if file else source
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=self.tracking_uri))

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise ServiceUnavailable(
                f"MLflow at {self.tracking_uri} did not {what}: {error}. Is it running, and is MLFLOW_TRACKING_URI "
                "its address?"
            ) from error
