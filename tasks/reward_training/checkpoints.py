"""Checkpoints of Hugging Face's Trainer: which of them are complete.

    checkpoints/
        checkpoint-50/    the Trainer's own files, then complete.json
        checkpoint-100/   …

The Trainer writes file by file; one that a kill cut short has no `complete.json` and is removed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks.titles.errors import CheckpointError
from tasks.titles.run_directory import write_json

_MARK = "complete.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    folder: Path


def mark_complete(checkpoints: Path, step: int, stories: str) -> None:
    """Declare the checkpoint of `step` complete; `stories` is a fingerprint of what it was trained on."""
    write_json(checkpoints / f"{_PREFIX}{step}" / _MARK, {"step": step, "stories": stories})


def newest_complete(checkpoints: Path, stories: str) -> Checkpoint | None:
    """Remove what was cut short, and return the newest complete checkpoint, None where there is none.

    Raises `CheckpointError` where that was trained on other stories.
    """
    complete = []
    for folder in checkpoints.glob(f"{_PREFIX}*"):
        if (folder / _MARK).is_file():
            complete.append(Checkpoint(int(folder.name.removeprefix(_PREFIX)), folder))
        else:
            shutil.rmtree(folder)
    if not complete:
        return None
    newest = max(complete, key=lambda checkpoint: checkpoint.step)
    there = json.loads((newest.folder / _MARK).read_text(encoding="utf-8"))["stories"]
    if there != stories:
        raise CheckpointError(
            f"{newest.folder} was trained on other stories ({there} there, {stories} now). Bring the stories back as "
            "they were, or start another run with --run-name or --fresh."
        )
    return newest
