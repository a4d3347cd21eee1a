"""What a reward model has to beat: predictions that cost a second."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from tasks.starter.reward_labels import label
from tasks.titles.story import Story

FEATURES = 2**14
"""Hashes of words; two words that share one are a little noise."""
ALPHA = 1.0
"""Ridge's penalty, for rows of length 1. It is not tuned."""
_WORD = re.compile(r"\w+")


def source_means(train: Sequence[Story], others: Sequence[Story], sources: Mapping[str, str]) -> list[float]:
    """Predict for each of `others` the mean label of the training stories of its source, or of all of them."""
    found: defaultdict[str | None, list[float]] = defaultdict(list)
    for story in train:
        found[sources.get(story.id)].append(label(story.score))
    mean = float(np.mean([label(story.score) for story in train]))
    return [float(np.mean(found.get(sources.get(story.id), mean))) for story in others]


def word_ridge(train: Sequence[Story], others: Sequence[Story]) -> list[float]:
    """Predict the labels of `others` by ridge regression on the words of title and body, weighted by TF-IDF.

    Titles and bodies weigh the same. It is for thousands of stories: its matrices are training stories squared.
    """
    labels = np.asarray([label(story.score) for story in train])
    alike, asked = np.zeros((len(train), len(train))), np.zeros((len(others), len(train)))
    for part in ("title", "scraped_body"):
        counts, other_counts = (_counts([getattr(story, part) for story in stories]) for stories in (train, others))
        rarity = np.log((1 + len(train)) / (1 + (counts > 0).sum(axis=0)))
        rows = _unit(counts * rarity)
        alike += rows @ rows.T
        asked += _unit(other_counts * rarity) @ rows.T
    weights = np.linalg.solve(alike + ALPHA * np.eye(len(train)), labels - labels.mean())
    return (labels.mean() + asked @ weights).tolist()


def _counts(texts: Sequence[str]) -> np.ndarray:
    """Return log(1 + count) of each hashed word [texts, FEATURES]."""
    counts = np.zeros((len(texts), FEATURES), dtype=np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word in _WORD.findall(text.lower()):
            row[zlib.crc32(word.encode("utf-8", "replace")) % FEATURES] += 1
    return np.log1p(counts)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
