"""A story: a body, the human title and what Hacker News made of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
COLUMNS = ("id", "by", "time", "title", "url", "score", "scraped_body", "split")
"""The columns that every source of stories is brought into."""


@dataclass(frozen=True, slots=True)
class Story:
    """One Hacker News submission.

    `time` is in UTC, or None where the source had no usable date. `by` and `url` are empty strings
    where the source had none. `score` is in upvotes.
    """

    id: str
    by: str
    time: datetime | None
    title: str
    url: str
    score: int
    scraped_body: str
    split: Split


@dataclass(frozen=True, slots=True)
class Prompt:
    """A story that passed the filters, with the policy's chat messages and their length in tokens."""

    story: Story
    messages: tuple[dict[str, str], ...]
    tokens: int
