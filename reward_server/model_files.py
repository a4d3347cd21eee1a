"""Where a reward model's files lie, and whether they may be loaded: safetensors only, one output, no code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.starter.paths import REWARD_MODEL, resolve
from tasks.titles.config import Settings
from tasks.titles.errors import ConfigError

logger = logging.getLogger(__name__)

_SAFE_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
"""What is fetched from a hub: weights as safetensors, configuration and tokenizer; no pickle, no Python."""
REGISTRY_SCHEME = "models:/"
"""How a model of MLflow's registry begins: `models:/name@alias` or `models:/name/3`."""
ADAPTER_FOLDER = "adapter"
"""Where the adapter lies within a registered model, its base in `base` beside it where that is on no hub."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class ModelFiles:
    """A reward model on disk."""

    name: str
    """What the user asked for."""
    base: Path
    """Folder of the classifier itself, or of the model under the adapter."""
    adapter: Path | None
    tokenizer: Path
    weights: tuple[Path, ...]

    def version(self) -> str:
        """Return the first 12 digits of the SHA-256 over the SHA-256 of each weights file."""
        total = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()[:12]


def find_model(name: str) -> ModelFiles:
    """Find a reward model by folder, hub name or MLflow's `models:/name@alias`, and check its files.

    'starter' is the embedded one.

    An adapter's `base_model_name_or_path` is read relative to the adapter's own folder where that leads to a
    folder, so that both can be moved together.

    Raises `ConfigError` where the model is missing, is stored as pickle only, or is no classifier with one output.
    """
    folder = _folder(resolve(name, REWARD_MODEL))
    if not (folder / "adapter_config.json").is_file():
        _check_one_output(folder, name)
        return ModelFiles(name=name, base=folder, adapter=None, tokenizer=folder, weights=_weights(folder))
    base_name = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base_name:
        raise ConfigError(f"{folder / 'adapter_config.json'} does not name its base model (base_model_name_or_path).")
    beside = folder / base_name
    base = beside.resolve() if beside.is_dir() else _folder(base_name, asked_by=folder)
    if (base / "adapter_config.json").is_file():
        raise ConfigError(f"The base model of adapter {folder} is itself an adapter ({base}). Merge it first.")
    if is_classifier(base):
        _check_one_output(base, str(base))
    adapter_weights = folder / "adapter_model.safetensors"
    if not adapter_weights.is_file():
        raise ConfigError(f"No adapter_model.safetensors in {folder}{_pickle_hint(folder)}")
    own_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    return ModelFiles(
        name=name,
        base=base,
        adapter=folder,
        tokenizer=folder if own_tokenizer else base,
        weights=(*_weights(base), adapter_weights),
    )


def is_classifier(folder: Path) -> bool:
    """Return whether the model in `folder` was saved as a sequence classifier."""
    architectures = _config(folder).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in architectures)


def _folder(name: str, asked_by: Path | None = None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.startswith(REGISTRY_SCHEME):
        return _registered(name)
    wanted_by = f", the base model of adapter {asked_by}" if asked_by else ""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"No folder '{name}'{wanted_by}. Expected a model folder or a hub name; an adapter finds its base by "
            "'base_model_name_or_path' in adapter_config.json, best written relative to the adapter's folder."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logger.info("Fetching %s from the hub", name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_SAFE_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"'{name}'{wanted_by} is neither a folder nor a model that the hub gave: {error}") from error


def _registered(name: str) -> Path:
    """Return the folder of a model in MLflow's registry: where it is stored, or a temporary copy of it."""
    # MLflow's own habit is seven retries of two minutes each.
    for key, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    uri = Settings().tracking_uri
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        model, version = get_model_name_and_version(client, name)
        source = client.get_model_version_download_uri(model, version)
        folder = Path(download_artifacts(artifact_uri=source, tracking_uri=uri))
    except (MlflowException, OSError, ValueError) as error:
        raise ConfigError(
            f"'{name}' is no model that MLflow at {uri} gave: {error}. Expected models:/<name>@<alias> or "
            "models:/<name>/<version>; MLFLOW_TRACKING_URI says which MLflow is asked."
        ) from error
    logger.info("%s is version %s, in %s", name, version, folder)
    adapter = folder / ADAPTER_FOLDER
    return (adapter if adapter.is_dir() else folder).resolve()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return content


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no model folder: it has no config.json.")
    return _read_json(folder / "config.json")


def _check_one_output(folder: Path, name: str) -> None:
    config = _config(folder)
    # A saved config names its labels only where their number is not two (transformers, PreTrainedConfig).
    labels = len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels") or 2)
    if not is_classifier(folder) or labels != 1:
        raise ConfigError(
            f"Reward model '{name}' must be a sequence classifier with one output (num_labels=1); its config.json "
            f"says architectures={config.get('architectures')} with {labels} labels."
        )


def _weights(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    shards = _read_json(index).get("weight_map", {}) if index.is_file() else {"all": "model.safetensors"}
    paths = tuple(folder / name for name in sorted(set(shards.values())))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ConfigError(f"No {', '.join(missing) or 'weights'} in {folder}{_pickle_hint(folder)}")
    return paths


def _pickle_hint(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return "."
    return (
        f", only {', '.join(pickles)}. Pickle files can run code when they are loaded and are refused; save the "
        "model as safetensors (save_pretrained does)."
    )
