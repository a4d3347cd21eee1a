"""Rows of any source, as plain values, made into stories.

A row that cannot be a story is dropped and counted by reason; a value that a story can do without is
mended and counted as a repair.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from tasks.titles.filters import Division, Reason
from tasks.titles.story import Split, Story

SplitOrUnknown = Split | Literal["unknown"]
Row = Mapping[str, Any]

# The first item on Hacker News, and a bound that any clock error or count of milliseconds lies beyond. It is
# fixed rather than today, so that one file gives the same stories on every day.
EARLIEST = datetime(2006, 10, 9, tzinfo=UTC)
LATEST = datetime(2100, 1, 1, tzinfo=UTC)

_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_FROM_TRAIN: dict[Split, float] = {"test": 0.05, "val": 0.05}
_INT64_LIMIT = 2**63


class Repair(StrEnum):
    """What was mended in a story that was kept."""

    NO_SUBMITTER = "no usable submitter: left empty"
    NO_URL = "no usable URL: left empty"
    NO_DATE = "no date: left empty"
    WRONG_DATE = "wrong date: left empty"
    ODD_CHARACTERS = "characters outside Unicode: replaced"


@dataclass(frozen=True)
class LoadedStories:
    """What a source held: its stories, and an account of every row that is not among them."""

    source: str
    stories: tuple[Story, ...]
    unusable: Mapping[tuple[SplitOrUnknown, Reason], int] = field(default_factory=dict)
    repairs: Mapping[Repair, int] = field(default_factory=dict)
    division: Division | None = None
    """What the source's splits lack, and what makes up for it."""


def read_rows(source: str, rows: Sequence[Row | None]) -> LoadedStories:
    """Make stories of `rows`; None stands for a row that could not be read at all."""
    unnamed = all(row is None or row.get("split") is None for row in rows)
    stories: list[Story] = []
    unusable: Counter[tuple[SplitOrUnknown, Reason]] = Counter()
    repairs: Counter[Repair] = Counter()
    for row in rows:
        if row is None:
            unusable["unknown", Reason.BROKEN_LINE] += 1
            continue
        split = "train" if unnamed else _named_split(row)
        if split is None:
            unusable["unknown", Reason.UNKNOWN_SPLIT] += 1
            continue
        story = _story(row, split, repairs)
        if isinstance(story, Reason):
            unusable[split, story] += 1
        else:
            stories.append(story)
    return LoadedStories(source, tuple(stories), unusable, repairs, _division(rows, unnamed))


def _story(row: Row, split: Split, repairs: Counter[Repair]) -> Story | Reason:
    """Make one story and count its repairs, or say why it cannot be one."""
    story_id = _identifier(row.get("id"))
    if story_id is None:
        return Reason.NO_ID
    score = _number(row.get("score"))
    if score is None or not float(score).is_integer():
        return Reason.NO_SCORE
    title, body = _text(row.get("title")), _text(row.get("scraped_body"))
    if title is None:
        return Reason.TITLE_NOT_TEXT
    if body is None:
        return Reason.BODY_NOT_TEXT
    by, url = _text(row.get("by")) or "", _text(row.get("url")) or ""
    time, date_repair = _date(row.get("time"))
    if not by:
        repairs[Repair.NO_SUBMITTER] += 1
    if not url:
        repairs[Repair.NO_URL] += 1
    if date_repair is not None:
        repairs[date_repair] += 1
    # The body stays as it is: a tokenizer decides whether it can read it, and that is counted by itself.
    whole = [text.encode("utf-8", "replace").decode() for text in (by, title, url)]
    if whole != [by, title, url]:
        repairs[Repair.ODD_CHARACTERS] += 1
    by, title, url = whole
    return Story(story_id, by, time, title, url, int(score), body, split)


def _division(rows: Sequence[Row | None], unnamed: bool) -> Division | None:
    """Return how the splits that the source lacks come about, or None where it lacks none."""
    if unnamed:
        return Division("train", _FROM_TRAIN, "The source has no split column: 5% became val and 5% test.")
    found = {_named_split(row) for row in rows if row is not None} - {None}
    if found == {"train"}:
        return Division("train", _FROM_TRAIN, "The source has a train split only: 5% of it became val and 5% test.")
    if found == {"train", "val"}:
        return Division("val", {"test": 0.5}, "The source has no test split: half of val became test.")
    if found == {"train", "test"}:
        return Division("test", {"val": 0.5}, "The source has no val split: half of test became val.")
    return None


def _named_split(row: Row) -> Split | None:
    name = _text(row.get("split"))
    return _SPLIT_NAMES.get(name.strip().lower()) if name else None


def _identifier(value: Any) -> str | None:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = (_text(value) or "").strip()
    return text if text and text.isprintable() else None


def _text(value: Any) -> str | None:
    """Return a text, empty for a null; None where the value is something else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else None


def _number(value: Any) -> int | float | None:
    """Return a finite number that fits 64 bits; None where the value is none."""
    if isinstance(value, bytes | str):
        # BigQuery writes 64-bit integers as strings into JSON.
        text = _text(value) or ""
        value = int(text) if re.fullmatch(r"-?[0-9]{1,19}", text) else None
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _INT64_LIMIT else None  # neither NaN nor infinity is


def _date(value: Any) -> tuple[datetime | None, Repair | None]:
    """Return a time in UTC from epoch seconds, a datetime or an ISO text, or None and the repair to count."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, Repair.NO_DATE
    try:
        seconds = _number(value)
        if seconds is not None:
            time = datetime.fromtimestamp(seconds, UTC)
        elif isinstance(value, bytes | str):
            time = datetime.fromisoformat(_text(value) or "")
        else:
            time = value
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError, OSError, AttributeError, TypeError):
        return None, Repair.WRONG_DATE
    return (time, None) if EARLIEST <= time <= LATEST else (None, Repair.WRONG_DATE)
