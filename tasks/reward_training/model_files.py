"""A finished reward model on disk: an adapter, and its base beside it where that is on no hub.

model/
    adapter/   adapter_config.json, adapter_model.safetensors, the tokenizer's files
    base/      config.json, *.safetensors
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from reward_server.model_files import ADAPTER_FOLDER

_BASE_FOLDER = "base"
_BASE_FILES = ("*.json", "*.safetensors")


def write_model(model: Any, tokenizer: Any, base: str, folder: Path) -> None:
    """Write a PEFT `model` on `base` (a folder or a hub name) as `folder`, whole or not at all.

    The folder can be moved and stored elsewhere: it holds its base, or names the hub's.
    """
    if folder.exists():
        return
    scratch = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(scratch, ignore_errors=True)
    adapter = scratch / ADAPTER_FOLDER
    local = Path(base).is_dir()
    model.peft_config["default"].base_model_name_or_path = f"../{_BASE_FOLDER}" if local else base
    # The embeddings are the base's; finding that out by itself, PEFT would ask the hub.
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    (adapter / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(adapter))
    if local:
        (scratch / _BASE_FOLDER).mkdir()
        for path in {path for pattern in _BASE_FILES for path in Path(base).glob(pattern)}:
            shutil.copy(path, scratch / _BASE_FOLDER)
    scratch.rename(folder)
