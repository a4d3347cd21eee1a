"""What is made of the steps of a run: rates, a step's parts, and how busy the GPU was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_watch import GpuWatch
from tasks.engines.contract import TrainingRequest
from tasks.engines.resume import journal_of
from tasks.titles import metric_names as names

SPLIT = (names.TIME_ROLLOUT, names.TIME_JUDGE, names.TIME_TRAIN, *names.GPU_TRAINING_TIMES, names.TIME_STEP)
WARM_UP = 2
"""Steps at the beginning in which kernels are compiled; they are told apart from the rest and not counted."""


class Plain:
    """A `RunTracker` that keeps nothing: the run's own directory holds every figure."""

    run_id = "no-tracker"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_titles(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def log_checkpoint(self, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
        """Do nothing."""


async def do_parts(
    parts: Mapping[str, Callable[[], Awaitable[None]]],
    found: dict[str, Any],
    say: Callable[..., None],
    keep: Callable[[], None],
) -> None:
    """Measure one part after another and call `keep` after each.

    What fails is told in `found` under `failed`, and the next part is tried.
    """
    for name, part in parts.items():
        try:
            await part()
        except Exception as error:
            found["failed"][name] = f"{type(error).__name__}: {error}"
            say(name, "FAILED:", found["failed"][name][:1500])
        keep()


@dataclass(frozen=True)
class BareStep:
    """What a step of a bare loop took, in seconds, and how many tokens were sampled for it."""

    rollout_s: float
    train_s: float
    tokens: int


@dataclass(frozen=True)
class Measured:
    """The figures of some steps, medians over them where nothing else is said."""

    steps: int
    steps_per_hour: float
    """From the mean time of a step."""
    rollout_tokens_per_s: float
    """Sampled tokens, over the time until the last title was written."""
    judge_requests_per_s: float
    """Reward server and validator together, over the time until the last title was judged."""
    train_tokens_per_s: float
    """Of all trajectories, each with its own prompt, over the time of training."""
    sampled_train_tokens_per_s: float
    gpu_busy: float | None
    peak_memory_gb: float | None
    split: dict[str, float] = field(default_factory=dict)
    """Seconds."""

    def told(self) -> dict[str, Any]:
        """Return the figures for people and for JSON."""
        return asdict(self)

    @classmethod
    def of_bare(
        cls,
        request: TrainingRequest,
        steps: Sequence[BareStep],
        watch: GpuWatch,
        since: float,
        until: float | None = None,
    ) -> Measured:
        """Return the figures of a bare loop's steps, which knows no more than when titles were judged."""
        titles = request.profile.groups_per_step * request.profile.group_size
        rows = [
            {
                names.TIME_ROLLOUT: step.rollout_s,
                names.TIME_JUDGE: 0.0,
                names.TIME_TRAIN: step.train_s,
                names.TIME_STEP: step.rollout_s + step.train_s,
                names.TRAIN_TOKENS: float(step.tokens),
                names.TRAIN_TRAJECTORIES: float(titles),
            }
            for step in steps
        ]
        return _measured(request, rows, watch, since, until)


def measured(
    request: TrainingRequest, watch: GpuWatch, *, since: float, steps: range, until: float | None = None
) -> Measured:
    """Return the figures of these steps of a run, the first ones left out.

    `since` is when they began, `until` when they ended; None: just now.
    """
    journal = journal_of(request.run_dir).rows()
    rows = [journal[step] for step in steps[WARM_UP:] if step in journal]
    return _measured(request, rows, watch, since, until)


def rates(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what is shown of a step while it goes on."""
    shown = (*SPLIT, names.TRAIN_REWARD, names.TRAIN_LOSS, names.TRAIN_GRAD_NORM, names.CANARY_MEAN_DIFFERENCE)
    return {name.split("/", 1)[1]: round(metrics[name], 3) for name in shown if name in metrics}


def _measured(
    request: TrainingRequest,
    rows: Sequence[Mapping[str, float]],
    watch: GpuWatch,
    since: float,
    until: float | None,
) -> Measured:
    prompt = statistics.mean(prompt.tokens for prompt in request.train)
    ended = until or time.time()

    def median(figure: Any) -> float:
        return round(statistics.median(figure(row) for row in rows), 2)

    return Measured(
        steps=len(rows),
        steps_per_hour=round(3600 / statistics.mean(row[names.TIME_STEP] for row in rows), 1),
        rollout_tokens_per_s=median(
            lambda row: row[names.TRAIN_TOKENS] / (row[names.TIME_ROLLOUT] - row[names.TIME_JUDGE])
        ),
        judge_requests_per_s=median(lambda row: 2 * row[names.TRAIN_TRAJECTORIES] / row[names.TIME_ROLLOUT]),
        train_tokens_per_s=median(
            lambda row: (prompt * row[names.TRAIN_TRAJECTORIES] + row[names.TRAIN_TOKENS]) / row[names.TIME_TRAIN]
        ),
        sampled_train_tokens_per_s=median(lambda row: row[names.TRAIN_TOKENS] / row[names.TIME_TRAIN]),
        gpu_busy=watch.busy(since, ended),
        peak_memory_gb=watch.peak_gb(since, ended),
        split={
            name.split("/", 1)[1]: round(statistics.median(row[name] for row in rows), 3)
            for name in SPLIT
            if name in rows[0]
        },
    )
