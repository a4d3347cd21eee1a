"""Where a run continues: its last complete checkpoint, and everything after it taken back.

A step is done in this order: the trainer writes the checkpoint's folder by rename; the step is
validated where due; its metrics go into the journal; `cursor.json` goes into the folder, which is the
commit mark; then MLflow is told. A kill at any moment leaves at most one folder without its mark and at
most one row of the journal after the last mark. Both are dropped here, and the step is done again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tasks.engines.checkpoints import (
    complete_steps,
    discard_incomplete,
    latest_complete,
    read_cursor,
    step_folder,
    steps_on_disk,
)
from tasks.engines.contract import TrainingRequest
from tasks.engines.journal import Journal
from tasks.engines.training_state import TrainingState, check_continues
from tasks.titles.config import EngineName
from tasks.titles.errors import CheckpointError

logger = logging.getLogger(__name__)

ART_PROJECT = "hn-titles"
ART_MODEL = "policy"


def engine_folder(run_dir: Path, engine: EngineName) -> Path:
    """Return the folder that an engine works in: ART's backend keeps its own order in it."""
    return run_dir / engine


def checkpoints_folder(run_dir: Path, engine: EngineName) -> Path:
    """Return where an engine keeps checkpoints: one folder per step, its name the step in four digits."""
    folder = engine_folder(run_dir, engine)
    if engine == "art":
        folder = folder / ART_PROJECT / "models" / ART_MODEL
    return folder / "checkpoints"


def adapter_folder(run_dir: Path, engine: EngineName, step: int) -> Path:
    """Return the folder of checkpoint `step`."""
    return step_folder(checkpoints_folder(run_dir, engine), step)


def journal_of(run_dir: Path) -> Journal:
    """Return the run's journal of metrics."""
    return Journal(run_dir / "metrics.jsonl")


def stored_state(run_dir: Path, engine: EngineName) -> TrainingState | None:
    """Return what the last complete checkpoint remembers, or None for a run that has none. Changes nothing."""
    folder = checkpoints_folder(run_dir, engine)
    step = latest_complete(folder)
    return None if step is None else TrainingState.from_json(read_cursor(step_folder(folder, step)))


def prepare_to_continue(request: TrainingRequest) -> TrainingState | None:
    """Bring the run's directory back to its last complete checkpoint and return its state, None for a fresh run.

    Must come before an engine looks at the folders: ART takes the highest number for the current step.

    Raises `CheckpointError` for checkpoints of another run, and for checkpoints without a cursor that no
    kill can have left: nobody knows which stories they have seen.
    """
    folder = checkpoints_folder(request.run_dir, request.profile.engine)
    state = stored_state(request.run_dir, request.profile.engine)
    if state is not None:
        check_continues(state, request)
    latest = state.cursor.step if state else -1
    incomplete = set(steps_on_disk(folder)) - set(complete_steps(folder))
    unexplained = sorted(incomplete - {latest + 1})
    if unexplained:
        raise CheckpointError(
            f"Checkpoint {', '.join(map(str, unexplained))} in {folder} has no cursor, so the stories that it has seen "
            "are unknown and the run cannot be continued from there. Put its cursor.json back, or start under another "
            "run name."
        )
    if discard_incomplete(folder):
        logger.info("Dropped what a killed run left of step %d", latest + 1)
    journal_of(request.run_dir).cut_after(latest)
    return state
