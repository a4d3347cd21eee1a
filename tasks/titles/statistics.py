"""Bootstrap intervals over stories.

A story is the unit that is resampled: several titles of one story share its body, so they are averaged
first and never counted as independent. Intervals are percentile intervals (Efron and Tibshirani, "An
Introduction to the Bootstrap", chapter 13) from a seeded generator, so the same values give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

LEVEL = 0.95
# Resampling works on blocks of this many index entries, so that 10,000 stories need no gigabytes.
_BLOCK = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the two ends of its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return `{"mean", "low", "high"}`."""
        return asdict(self)


def mean_interval(values: Sequence[float], *, samples: int, seed: int) -> Interval:
    """Return the mean of `values` (one per story) and its interval.

    Raises `ValueError` for no values or values that are not finite. A single story has no spread to
    resample, so its interval is the value itself.
    """
    table = _table(values)
    means = _resampled_means(table, samples=samples, seed=seed)[:, 0]
    return _interval(float(table.mean()), means)


def paired_difference(after: Sequence[float], before: Sequence[float], *, samples: int, seed: int) -> Interval:
    """Return the mean of `after - before` over the same stories, and its interval.

    Both sequences hold one value per story in the same order. Raises `ValueError` where they differ in length.
    """
    table = _table(after, before)
    differences = table[:, 0] - table[:, 1]
    means = _resampled_means(differences[:, None], samples=samples, seed=seed)[:, 0]
    return _interval(float(differences.mean()), means)


def paired_ratio(after: Sequence[float], before: Sequence[float], *, samples: int, seed: int) -> Interval | None:
    """Return mean(after) / mean(before) over the same stories, and its interval.

    None where the mean of `before`, or of one of its resamples, is not positive: a ratio says nothing there.
    """
    table = _table(after, before)
    means = _resampled_means(table, samples=samples, seed=seed)
    estimate = table.mean(axis=0)
    if estimate[1] <= 0 or np.any(means[:, 1] <= 0):
        return None
    return _interval(float(estimate[0] / estimate[1]), means[:, 0] / means[:, 1])


def _table(*columns: Sequence[float]) -> np.ndarray:
    """Return the columns side by side as float64 of shape [stories, columns]."""
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"Paired values must belong to the same stories, got {[len(c) for c in columns]} of them.")
    if lengths == {0}:
        raise ValueError("An interval needs at least one story, got none.")
    table = np.asarray(columns, dtype=np.float64).T
    if not np.isfinite(table).all():
        raise ValueError("An interval needs finite values; drop failed judgements and count them first.")
    return table


def _resampled_means(table: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Return the column means of `samples` resamples of the rows: [stories, columns] -> [samples, columns]."""
    stories = len(table)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // stories)
    parts = []
    for start in range(0, samples, block):
        rows = generator.integers(0, stories, size=(min(block, samples - start), stories))
        parts.append(table[rows].mean(axis=1))
    return np.concatenate(parts)


def _interval(estimate: float, resampled: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(mean=estimate, low=float(low), high=float(high))
