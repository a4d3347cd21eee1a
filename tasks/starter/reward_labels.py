"""What a reward model is trained to predict, and how its predictions are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def label(score: int) -> float:
    """Return the target for a story of `score` upvotes: its natural logarithm, 0 for a score below 1.

    Upvotes are spread over orders of magnitude, so an error is meant as a factor: 0.7 is twice or half.
    """
    return math.log(max(score, 1))


def prediction_quality(predicted: Sequence[float], labels: Sequence[float], constant: float) -> dict[str, float]:
    """Return RMSE, the RMSE of always predicting `constant` (the mean of the training labels), Pearson and Spearman.

    Raises `ValueError` for fewer than three pairs or labels without spread.
    """
    return {**errors(predicted, labels, constant), **correlations(predicted, labels)}


def errors(predicted: Sequence[float], labels: Sequence[float], constant: float) -> dict[str, float]:
    """Return RMSE, and the RMSE of always predicting `constant`."""
    guesses, truth = np.asarray(predicted, float), np.asarray(labels, float)
    return {
        "rmse": float(np.sqrt(np.mean((guesses - truth) ** 2))),
        "rmse_baseline": float(np.sqrt(np.mean((constant - truth) ** 2))),
    }


def correlations(predicted: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation.

    Raises `ValueError` for fewer than three pairs or a side without spread.
    """
    guesses, truth = np.asarray(predicted, float), np.asarray(labels, float)
    # Not the standard deviation alone: of three times 0.1 it is 1e-17.
    if len(truth) < 3 or any(np.ptp(side) == 0 or side.std() == 0 for side in (truth, guesses)):
        raise ValueError("Correlations need at least three pairs with some spread on both sides.")
    return {
        "pearson": float(np.corrcoef(guesses, truth)[0, 1]),
        "spearman": float(np.corrcoef(_ranks(guesses), _ranks(truth))[0, 1]),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
