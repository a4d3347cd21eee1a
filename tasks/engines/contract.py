"""What goes into a training engine and what comes out, the same for every engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks.titles.config import Profile
from tasks.titles.story import Prompt


@dataclass(frozen=True)
class TrainingRequest:
    """Everything an engine needs; the stories are already filtered and tokenised."""

    profile: Profile
    run_name: str
    run_dir: Path
    base_model: str
    """A folder or a hub name, 'starter' already resolved."""
    train: Sequence[Prompt]
    val: Sequence[Prompt]
    reward_model_url: str
    reward_model_api_key: str | None = None


@dataclass(frozen=True)
class TrainingResult:
    """What a finished (or already complete) training left on disk."""

    engine: str
    steps: int
    best_step: int
    """The kept checkpoint with the highest `val/reward/mean`; 0 is the untrained adapter."""
    checkpoints: dict[int, Path]
    seconds: float
    """Wall clock of training over all sittings, in seconds."""
    trajectories_dropped: int
    collapsed_at: int | None = None
    """The first step at which the collapse alarm rang: the reward fell under half of its start."""


GroupRollout = Callable[[Prompt], Awaitable[Any]]
"""Rolls out one trajectory group."""
GroupMapper = Callable[[GroupRollout, Sequence[Prompt], int], Awaitable[list[Any]]]
"""Runs a `GroupRollout` over the prompts of a step (counted from 1), concurrently, keeping their order; Prefect's
stands in `tasks/rollouts.py`."""


@dataclass(frozen=True)
class Progress:
    """What a watcher sees after each step."""

    step: int
    max_steps: int
    metrics: Mapping[str, float]
    validation_titles: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """Rows of the last validation, where this step had one."""


ProgressListener = Callable[[Progress], None]


class RunTracker(Protocol):
    """Where numbers, titles and checkpoints go (MLflow: `tasks/engines/tracker.py`).

    Its methods never raise while training: what could not be stored is logged as a warning.
    """

    run_id: str

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store the metrics of one step; a (metric, step) that is stored already is left alone."""
        ...

    def log_titles(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store titles as a table under `name`."""
        ...

    def log_checkpoint(self, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
        """Store a kept checkpoint as a LoggedModel with its validation metrics and its adapter."""
        ...
