"""Bootstrap intervals over stories, and over stories and seeds.

A story is the unit that is resampled: several titles of one story share its body, so they are averaged
first and never counted as independent. Intervals are percentile intervals (Efron and Tibshirani, "An
Introduction to the Bootstrap", chapter 13) from a seeded generator, so the same values give the same interval.

Where one method was trained with several seeds, its values are a table [seeds, stories], and seeds and stories are
resampled independently of each other (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007).
A handful of seeds has too few resamples to show how far their mean can be off: with three, the plain bootstrap calls
one in four differences real that are nothing but luck of the seeds. The part of each resample that comes from the
seeds is therefore stretched as Student's t stretches the interval of a mean: much for two seeds, hardly for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
SMALLEST_DIVISOR = 1e-9
"""A mean up to this is taken for 0: rewards and scores are logarithms of counts."""
# Resampling works on blocks of this many index entries, so that 10,000 stories need no gigabytes.
_BLOCK = 4_000_000

Table = Sequence[Sequence[float]] | np.ndarray
"""Values [seeds, stories]; NaN where there is none. One row stands for every seed."""
_Statistic = Callable[[np.ndarray], np.ndarray]
"""Makes estimates [resamples] of column means [resamples, columns]."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the two ends of its 95% interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return `{"mean", "low", "high"}`."""
        return asdict(self)

    def within(self, low: float, high: float) -> Interval:
        """Return the interval cut to what the quantity can be: a share lies between 0 and 1."""
        return Interval(self.mean, max(self.low, low), min(self.high, high))

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0: of a difference, that it is real."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], *, samples: int, seed: int) -> Interval:
    """Return the mean of `values` (one per story) and its interval.

    Raises `ValueError` for no values or values that are not finite. A single story has no spread to
    resample, so its interval is the value itself.
    """
    return _bootstrap([_row(values)], _first, samples=samples, seed=seed)


def paired_difference(after: Sequence[float], before: Sequence[float], *, samples: int, seed: int) -> Interval:
    """Return the mean of `after - before` over the same stories, and its interval.

    Both sequences hold one value per story in the same order. Raises `ValueError` where they differ in length.
    """
    return crossed_difference(_row(after), _row(before), samples=samples, seed=seed)


def paired_ratio(after: Sequence[float], before: Sequence[float], *, samples: int, seed: int) -> Interval | None:
    """Return mean(after) / mean(before) over the same stories, and its interval.

    None where the mean of `before`, or of one of its resamples, is 0 or negative: a ratio says nothing there.
    """
    return crossed_ratio(_row(after), _row(before), samples=samples, seed=seed)


def crossed_interval(table: Table, *, samples: int, seed: int) -> Interval:
    """Return the mean of `table` and its interval over seeds and stories.

    Raises `ValueError` for a table without values or with infinite ones.
    """
    return _bootstrap([_crossed(table)], _first, samples=samples, seed=seed)


def crossed_difference(after: Table, before: Table, *, samples: int, seed: int) -> Interval:
    """Return the mean of `after - before` over the (seed, story) pairs that both have, and its interval.

    Raises `ValueError` where the tables are not of the same stories and seeds.
    """
    first, second = _paired(after, before)
    return _bootstrap([first - second], _first, samples=samples, seed=seed)


def crossed_ratio(after: Table, before: Table, *, samples: int, seed: int) -> Interval | None:
    """Return mean(after) / mean(before) over the (seed, story) pairs that both have, and its interval.

    None where the mean of `before`, or of one of its resamples, is 0 or negative: a ratio says nothing there.
    """
    try:
        return _bootstrap(_paired(after, before), _quotient, samples=samples, seed=seed)
    except _NoRatio:
        return None


def crossed_win_rate(after: Table, before: Table, *, tie: float, samples: int, seed: int) -> Interval:
    """Return the share of (seed, story) pairs with `after` above `before`, and its interval.

    Pairs that differ by no more than `tie` count half.
    """
    first, second = _paired(after, before)
    difference = first - second
    wins = np.where(np.abs(difference) <= tie, 0.5, (difference > 0).astype(np.float64))
    share = _bootstrap([np.where(np.isnan(difference), np.nan, wins)], _first, samples=samples, seed=seed)
    return share.within(0.0, 1.0)


class _NoRatio(Exception):
    """A mean to divide by is 0, negative, or so small that the quotient may be no finite number."""


def _first(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


def _quotient(means: np.ndarray) -> np.ndarray:
    if np.any(means[:, 1] <= SMALLEST_DIVISOR):
        raise _NoRatio
    return means[:, 0] / means[:, 1]


def _row(values: Sequence[float]) -> np.ndarray:
    """Return one value per story as a table of one row, all of them finite."""
    row = np.asarray(values, dtype=np.float64)[None]
    if not np.isfinite(row).all():
        raise ValueError("An interval needs finite values; drop failed judgements and count them first.")
    return row


def _crossed(table: Table) -> np.ndarray:
    values = np.asarray(table, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"A table of seeds and stories has two dimensions, got {values.ndim}.")
    if np.isinf(values).any():
        raise ValueError("An interval needs finite values, got infinite ones.")
    return values


def _paired(after: Table, before: Table) -> list[np.ndarray]:
    """Return both tables with the same rows and with NaN wherever one of them has no value."""
    first, second = _crossed(after), _crossed(before)
    seeds = {len(table) for table in (first, second)} - {1}
    if first.shape[1] != second.shape[1] or len(seeds) > 1:
        raise ValueError(
            f"Paired values must belong to the same stories and seeds, got tables of {first.shape} and {second.shape}."
        )
    missing = np.isnan(first) | np.isnan(second)
    return [np.where(missing, np.nan, table) for table in (first, second)]


def _bootstrap(columns: Sequence[np.ndarray], statistic: _Statistic, *, samples: int, seed: int) -> Interval:
    """Return the statistic of the columns' means, each of [seeds, stories] and missing in the same places."""
    there = ~np.isnan(columns[0])
    rows, stories = there.any(axis=1), there.any(axis=0)
    if not rows.any():
        raise ValueError("An interval needs at least one story, got none.")
    values = np.stack([column[rows][:, stories] for column in columns])
    present = ~np.isnan(values[0])
    values = np.where(present, values, 0.0)
    estimate = float(statistic((values.sum(axis=(1, 2)) / present.sum())[None])[0])

    stretch = seed_stretch(len(present))
    # Stories and seeds draw from generators of their own, so that the stories drawn do not depend on how many seeds
    # there are.
    story_draws, seed_draws = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    block = max(1, _BLOCK // present.shape[1])
    parts = []
    for start in range(0, samples, block):
        count = min(block, samples - start)
        by_story = _draw(story_draws, present.shape[1], count)
        by_seed = _draw(seed_draws, present.shape[0], count)
        resampled, known = _means(values, present, by_seed, by_story)
        part = statistic(resampled)
        if stretch > 1:
            from_seeds = statistic(_means(values, present, by_seed, np.ones_like(by_story))[0][known])
            part = part + (stretch - 1) * (from_seeds - estimate)
        parts.append(part)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    return Interval(mean=estimate, low=float(low), high=float(high))


def _draw(generator: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Return how often each of `size` items comes in `count` draws with replacement, as [count, size]."""
    drawn = generator.integers(0, size, size=(count, size)) + size * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def _means(
    values: np.ndarray, present: np.ndarray, by_seed: np.ndarray, by_story: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each resample's means [resamples, columns], and which resamples they are of all.

    A resample that hits nothing but missing values is left out.
    """
    weights = ((by_seed @ present) * by_story).sum(axis=1)
    sums = np.stack([((by_seed @ column) * by_story).sum(axis=1) for column in values], axis=1)
    known = weights > 0
    return sums[known] / weights[known, None], known


def seed_stretch(seeds: int) -> float:
    """Return what the deviations of resampled means of so few seeds are multiplied by: 1 for one seed (no spread to
    speak of) and towards 1 for many.

    The variance of a resampled mean lacks the factor n / (n - 1), and its quantiles are Student's, not the normal
    distribution's; those come from Cornish and Fisher's expansion (Abramowitz and Stegun, 26.7.5), which falls short
    of the true ones by 3% for three seeds and by a quarter for two.
    """
    if seeds == 1:
        return 1.0
    z, freedom = NormalDist().inv_cdf((1 + LEVEL) / 2), seeds - 1
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return math.sqrt(seeds / freedom) * student / z
