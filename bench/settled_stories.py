"""Real stories whose scores are final, and how much of a prediction is more than knowing where a story was found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from tasks.reward_training.stories import TRAIN_SHARE
from tasks.starter.reward_labels import correlations
from tasks.titles.errors import DataError
from tasks.titles.rows import LoadedStories, read_rows
from tasks.titles.story import COLUMNS, Story

SplitBy = Literal["time", "own"]
"""By time, or as the file's own column says."""
LEAST_OF_A_SOURCE = 5
"""A source's mean is taken from so many stories at least."""
_KIND, _SOURCE = "score_kind", "body_source"


@dataclass(frozen=True)
class SettledStories:
    """Stories that votes are no longer expected for."""

    loaded: LoadedStories
    sources: Mapping[str, str]
    """Where each story's body was found, by its id; empty where the file does not say so."""
    early: int
    """Rows that are left out: their score was read within hours, so that it is no label."""


def read_settled(path: Path) -> SettledStories:
    """Read a parquet file of stories, all of which are settled where it has no column `score_kind`."""
    with pq.ParquetFile(path) as file:
        wanted = [name for name in (*COLUMNS, _KIND, _SOURCE) if name in file.schema_arrow.names]
        rows = file.read(columns=wanted).to_pylist()
    settled = [row for row in rows if row.get(_KIND) != "early"]
    sources = {str(row["id"]): row[_SOURCE] for row in settled if row.get(_SOURCE)}
    return SettledStories(read_rows(path.name, settled), sources, len(rows) - len(settled))


def last_training_day(stories: Sequence[Story]) -> date:
    """Return the day that a tenth of the days with stories lie behind.

    It is a tenth of the days, not of the stories: most of the latter may be of the last weeks. Raises `DataError`
    where no story has a date.
    """
    days = sorted({story.time.date() for story in stories if story.time is not None})
    if not days:
        raise DataError("No settled story has a date to split by. Expected a column time, or --split own.")
    return days[math.ceil(TRAIN_SHARE * len(days)) - 1]


def within_sources(
    predicted: Sequence[float], labels: Sequence[float], sources: Sequence[str | None]
) -> tuple[float | None, int]:
    """Return Pearson's correlation after each source's mean is taken from both sides, and of how many stories.

    Sources with fewer than `LEAST_OF_A_SOURCE` stories are left out. The correlation is None where there is none.
    """
    counts = Counter(source for source in sources if source is not None)
    guesses, truth, names = np.asarray(predicted, float), np.asarray(labels, float), np.asarray(sources, object)
    parts = [names == source for source, count in counts.items() if count >= LEAST_OF_A_SOURCE]
    if not parts:
        return None, 0
    guesses, truth = (
        np.concatenate([values[part] - values[part].mean() for part in parts]) for values in (guesses, truth)
    )
    if np.allclose(guesses, 0):  # a constant for each source; what is left of it is rounding
        return None, len(truth)
    try:
        return correlations(guesses.tolist(), truth.tolist())["pearson"], len(truth)
    except ValueError:
        return None, len(truth)
