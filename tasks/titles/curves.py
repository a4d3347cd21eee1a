"""A training's curve over everything that a budget can be counted in, and where its time went, from its journal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from tasks.titles.config import Profile
from tasks.titles.errors import CheckpointError
from tasks.titles.metric_names import (
    TIME_ELAPSED,
    TIME_JUDGE,
    TIME_ROLLOUT,
    TIME_STEP,
    TIME_TRAIN,
    TRAIN_REWARD,
    TRAIN_TOKENS,
    TRAIN_TRAJECTORIES,
    VAL_REWARD_MEAN,
)

Rows = Mapping[int, Mapping[str, float]]
"""The journal's metrics by step; row 0 is the untrained policy's, with a validation alone."""
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One step, with everything that was spent up to and including it."""

    step: int
    trajectories: int
    tokens: int
    seconds: float
    device_seconds: float
    cost: float | None
    """In the currency of the profile's price; None where it names none."""
    train_reward: float | None
    val_reward: float | None


@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Mean seconds of a step; the four add up to the whole of it."""

    write: float
    judge: float
    train: float
    other: float


def curve(rows: Rows, profile: Profile) -> list[CurvePoint]:
    """Return a point per step, step 0 included; raise `CheckpointError` for a row without the metrics that it needs."""
    points = []
    trajectories = tokens = 0
    for step in sorted(rows):
        row = rows[step]
        if step > 0:
            trajectories += int(_value(rows, step, TRAIN_TRAJECTORIES))
            tokens += int(_value(rows, step, TRAIN_TOKENS))
        seconds = _value(rows, step, TIME_ELAPSED) if step > 0 else row.get(TIME_ELAPSED, 0.0)
        points.append(
            CurvePoint(
                step=step,
                trajectories=trajectories,
                tokens=tokens,
                seconds=seconds,
                device_seconds=seconds * profile.devices_in_use,
                cost=cost(seconds, profile),
                train_reward=row.get(TRAIN_REWARD),
                val_reward=row.get(VAL_REWARD_MEAN),
            )
        )
    return points


def cost(seconds: float, profile: Profile) -> float | None:
    """Return what `seconds` of wall clock cost on the profile's devices, None where it names no price."""
    if profile.price_per_device_hour == 0:
        return None
    return seconds * profile.devices_in_use * profile.price_per_device_hour / _SECONDS_PER_HOUR


def time_per_step(rows: Rows) -> TimeSplit:
    """Return where the time of a mean step went.

    Raises `CheckpointError` for a row without the metrics that it needs, or without any step.
    """
    steps = [step for step in rows if step > 0]
    if not steps:
        raise CheckpointError("The run's journal has no step yet, so no step took any time. Train it first.")
    rollout, judge, train, whole = (
        statistics.fmean(_value(rows, step, name) for step in steps)
        for name in (TIME_ROLLOUT, TIME_JUDGE, TIME_TRAIN, TIME_STEP)
    )
    return TimeSplit(write=rollout - judge, judge=judge, train=train, other=whole - rollout - train)


def _value(rows: Rows, step: int, name: str) -> float:
    try:
        return rows[step][name]
    except KeyError as error:
        raise CheckpointError(
            f"Step {step} of the run's journal has no '{name}', which a comparison needs; it has "
            f"{', '.join(sorted(rows[step])) or 'nothing'}. Train the run again with this version."
        ) from error
