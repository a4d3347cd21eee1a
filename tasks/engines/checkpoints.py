"""Checkpoint folders of one run: written whole or not at all, complete only with their data cursor.

    checkpoints/
        0000/   adapter_config.json, adapter_model.safetensors, …, cursor.json
        0001/   …
        .new-0002-x1y2/   being written; left over only by a kill, never read

The engine puts the folder in its place with one rename; the training loop then adds `cursor.json`, the
last thing it does for a step. A folder without it belongs to a step that was cut short.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.titles.errors import CheckpointError

CURSOR = "cursor.json"
_NEW, _OLD = ".new-", ".old-"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return checkpoints / f"{step:04d}"


def steps_on_disk(checkpoints: Path) -> list[int]:
    """Return the steps that have a folder, complete or not, in ascending order."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(entry.name) for entry in checkpoints.iterdir() if entry.is_dir() and entry.name.isdigit())


@contextmanager
def write_checkpoint(checkpoints: Path, step: int) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving, it becomes the checkpoint of `step` in one rename.

    Where the body raises, nothing is left. Raises `CheckpointError` when that checkpoint exists already.
    """
    target = step_folder(checkpoints, step)
    checkpoints.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise CheckpointError(f"{target} exists already; a checkpoint is never written twice. Resume from it instead.")
    temporary = Path(tempfile.mkdtemp(prefix=f"{_NEW}{step:04d}-", dir=checkpoints))
    # mkdtemp makes a folder for its owner only; a checkpoint is as readable as the rest of the run.
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        temporary.rename(target)
        _sync(checkpoints)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def commit_checkpoint(folder: Path, cursor: Mapping[str, Any]) -> None:
    """Make the checkpoint in `folder` complete by writing its cursor, whole.

    `cursor["step"]` must be the folder's own step. Raises `CheckpointError` otherwise, or when there is
    no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder} to write a cursor into.")
    if cursor.get("step") != int(folder.name):
        raise CheckpointError(f"A cursor of step {cursor.get('step')} does not belong into {folder}.")
    temporary = folder / f"{_NEW}{CURSOR}"
    temporary.write_text(json.dumps(cursor, indent=2) + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(folder / CURSOR)
    _sync(folder)


def read_cursor(folder: Path) -> dict[str, Any]:
    """Return the cursor of a complete checkpoint; raise `CheckpointError` where there is none that can be read."""
    try:
        cursor = json.loads((folder / CURSOR).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {CURSOR}: {error}") from error
    if not isinstance(cursor, dict) or cursor.get("step") != int(folder.name):
        raise CheckpointError(f"{folder / CURSOR} is not the cursor of step {int(folder.name)}.")
    return cursor


def complete_steps(checkpoints: Path) -> list[int]:
    """Return the steps whose checkpoint is complete, in ascending order.

    A cursor of another step does not count: ART copies a whole folder to the next step when there was
    nothing to train on.
    """
    return [step for step in steps_on_disk(checkpoints) if _is_complete(step_folder(checkpoints, step))]


def latest_complete(checkpoints: Path) -> int | None:
    """Return the highest complete step, or None where there is none."""
    return max(complete_steps(checkpoints), default=None)


def discard_incomplete(checkpoints: Path) -> list[int]:
    """Remove what a kill left behind, and return the steps that were removed.

    Raises `CheckpointError` when there are trained checkpoints and none has a cursor: they were not
    written by this project's loop, or their cursors are gone, and going on would start over in silence.
    """
    steps = steps_on_disk(checkpoints)
    complete = complete_steps(checkpoints)
    if any(step > 0 for step in steps) and not complete:
        raise CheckpointError(
            f"{checkpoints} holds the steps {steps}, but none has a {CURSOR}, so it is not known which stories were "
            "seen. Start the run under another name, or remove the folder to start over."
        )
    discarded = [step for step in steps if step not in complete]
    for step in discarded:
        _remove(step_folder(checkpoints, step))
    if checkpoints.is_dir():
        for entry in checkpoints.iterdir():
            if entry.name.startswith((_NEW, _OLD)):
                shutil.rmtree(entry)
    return discarded


def prune(checkpoints: Path, keep: Collection[int]) -> list[int]:
    """Remove every checkpoint but those of the steps in `keep`, and return the steps that were removed."""
    removed = [step for step in steps_on_disk(checkpoints) if step not in keep]
    for step in removed:
        _remove(step_folder(checkpoints, step))
    return removed


def _is_complete(folder: Path) -> bool:
    try:
        read_cursor(folder)
    except CheckpointError:
        return False
    return True


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle must not leave half a checkpoint under its own name.
    doomed = Path(tempfile.mkdtemp(prefix=_OLD, dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Make a file or folder survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
