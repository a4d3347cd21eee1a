"""A finished reward model in MLflow's registry."""

from __future__ import annotations

from pathlib import Path

from tasks.titles.errors import ServiceUnavailable

ALIAS = "newest"
"""Which version `models:/<name>@newest` is: the one that was registered last."""
_ARTIFACT = "reward-model"


def register_model(folder: Path, *, name: str, tracking_uri: str, run_id: str) -> str:
    """Store `folder` with its MLflow run, register it as a version of `name`, and return `models:/<name>/<version>`.

    A run's model is registered once, however often this is called. Raises `ServiceUnavailable` where MLflow does not
    take it.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        if not client.search_registered_models(filter_string=f"name = '{name}'"):
            client.create_registered_model(name, description="Predicts the log upvotes of Hacker News titles.")
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        if known:
            version = known[0].version
        else:
            client.log_artifacts(run_id, str(folder), _ARTIFACT)
            source = f"{client.get_run(run_id).info.artifact_uri}/{_ARTIFACT}"
            version = client.create_model_version(name, source, run_id=run_id).version
            client.set_registered_model_alias(name, ALIAS, version)
    except (MlflowException, OSError) as error:
        raise ServiceUnavailable(
            f"MLflow at {tracking_uri} did not register the reward model in {folder}: {error}. The same command tries "
            "again and trains nothing twice."
        ) from error
    return f"models:/{name}/{version}"
