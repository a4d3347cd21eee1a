"""How good a reward model's predictions are: errors, order and calibration of one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tasks.starter.reward_labels import correlations, errors, label

RATIO = 2
"""Two stories are a pair where one has at least this many times the other's upvotes: less is mostly luck."""
DECILES = 10


@dataclass(frozen=True, slots=True)
class Decile:
    """A tenth of the stories, by prediction; both means are in log upvotes."""

    stories: int
    predicted: float
    observed: float


@dataclass(frozen=True, slots=True)
class Quality:
    """The figures of one split; None where there is none to be had (two stories, no spread, no pair)."""

    stories: int
    rmse: float
    rmse_baseline: float
    """Of always predicting the mean of the training labels."""
    pearson: float | None
    spearman: float | None
    pairs: int
    pairwise_accuracy: float | None
    """Share of pairs whose better story has the higher prediction; equal predictions count half."""
    calibration_error: float
    """Mean distance of predicted and observed over the deciles, weighted by their stories."""
    deciles: tuple[Decile, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def metrics(self, split: str) -> dict[str, float]:
        """Return everything as metrics, by name."""
        values = {name: value for name, value in self.as_dict().items() if isinstance(value, int | float)}
        for number, decile in enumerate(self.deciles, start=1):
            values[f"calibration/decile_{number:02d}/predicted"] = decile.predicted
            values[f"calibration/decile_{number:02d}/observed"] = decile.observed
        return {f"{split}/{name}": float(value) for name, value in values.items()}


def quality(predicted: Sequence[float], scores: Sequence[int], train_mean: float) -> Quality:
    """Return the figures of predictions in log upvotes for stories of `scores` upvotes.

    Raises `ValueError` for no stories, a different number of each, or predictions that are not finite.
    """
    if not predicted or len(predicted) != len(scores) or not np.isfinite(predicted).all():
        raise ValueError(f"Expected finite predictions for {len(scores)} stories, got {len(predicted)}.")
    labels = [label(score) for score in scores]
    try:
        related: dict[str, float | None] = {**correlations(predicted, labels)}
    except ValueError:
        related = {"pearson": None, "spearman": None}
    right, pairs = pairwise(predicted, scores)
    tenths = deciles(predicted, labels)
    distance = sum(tenth.stories * abs(tenth.predicted - tenth.observed) for tenth in tenths)
    error = errors(predicted, labels, train_mean)
    return Quality(
        stories=len(labels),
        rmse=error["rmse"],
        rmse_baseline=error["rmse_baseline"],
        pearson=related["pearson"],
        spearman=related["spearman"],
        pairs=pairs,
        pairwise_accuracy=right / pairs if pairs else None,
        calibration_error=distance / len(labels),
        deciles=tenths,
    )


def pairwise(predicted: Sequence[float], scores: Sequence[int]) -> tuple[float, int]:
    """Return how many pairs are ordered rightly (equal predictions count half), and how many there are.

    A score below 1 counts as 1, as it does in the label.
    """
    guesses, upvotes = np.asarray(predicted, float), np.maximum(np.asarray(scores), 1)
    right, pairs = 0.0, 0
    for guess, score in zip(guesses, upvotes, strict=True):
        worse = guesses[upvotes * RATIO <= score]
        pairs += len(worse)
        right += float((worse < guess).sum() + 0.5 * (worse == guess).sum())
    return right, pairs


def deciles(predicted: Sequence[float], labels: Sequence[float]) -> tuple[Decile, ...]:
    """Return ten even parts of the stories (fewer where there are fewer stories), from low to high predictions."""
    guesses, truth = np.asarray(predicted, float), np.asarray(labels, float)
    order = np.argsort(guesses, kind="stable")
    parts = np.array_split(order, min(DECILES, len(order)))
    return tuple(Decile(len(part), float(guesses[part].mean()), float(truth[part].mean())) for part in parts)
