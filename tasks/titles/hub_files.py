"""What a model's files say before anything is loaded: from its folder, from the hub's cache, or by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.titles.errors import ConfigError
from tasks.titles.model_shape import ModelShape, read_shape

_QWEN: Mapping[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 32768}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        **_QWEN,
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        **{"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        **_QWEN,
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    },
}
"""The sizes of the profiles' own models, so that their memory can be told before they are downloaded."""
WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What is known of a model without loading it."""

    name: str
    shape: ModelShape | None
    """None where the sizes are not known; `problem` says why."""
    weight_bytes: int | None
    """Bytes of the weights on this disk, None where they are not here."""
    problem: str | None = None

    @property
    def here(self) -> bool:
        """Whether the weights are on this disk."""
        return self.weight_bytes is not None


def hub_cache() -> Path:
    """Return where the hub's client keeps models and stories."""
    home = Path(os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def model_files(name: str) -> ModelFiles:
    """Return what is known of the model in a folder or of a hub name; the network is not asked."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _newest_snapshot(f"models--{name.replace('/', '--')}") or folder
    weights = next((sizes for kind in WEIGHTS if (sizes := [file.stat().st_size for file in folder.glob(kind)])), None)
    size = sum(weights) if weights else None
    try:
        return ModelFiles(name, read_shape(_config(name, folder), name), size)
    except ConfigError as error:
        return ModelFiles(name, None, size, str(error))


def data_set_is_here(name: str) -> bool:
    """Return whether some of a hub data set is in the cache."""
    return _newest_snapshot(f"datasets--{name.replace('/', '--')}") is not None


def _config(name: str, folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if name in KNOWN:
            return KNOWN[name]
        raise ConfigError(f"The size of {name} is not known: it is neither a folder nor in the hub's cache.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error


def _newest_snapshot(repository: str) -> Path | None:
    snapshots = hub_cache() / repository / "snapshots"
    found = sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime) if snapshots.is_dir() else []
    return found[-1] if found else None
