"""What goes over the wire."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MAX_TITLE = 2_000
"""Characters; Hacker News takes 80, a policy that rambles for 100 tokens stays below this."""
MAX_BY = 200
MAX_URL = 2_000
MAX_BODY = 500_000
"""Characters; the model reads the first few thousand tokens only, more would just be sent for nothing."""
MAX_BATCH = 128
"""Texts in one batch request."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND = int((datetime(1, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds())
_LAST_SECOND = int((datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - _EPOCH).total_seconds())
_ISO = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d([.]\d{1,12})?)?([Zz]|[+-]\d\d:\d\d)?)?", re.ASCII)


def read_time(value: Any) -> datetime | None:
    """Return the moment that epoch seconds, an ISO 8601 string or null stand for, in UTC.

    A string without an offset is taken as UTC. Raises `ValueError` for anything else.
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        moment = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not _FIRST_SECOND <= value <= _LAST_SECOND:
            raise ValueError(f"epoch seconds must lie between {_FIRST_SECOND} and {_LAST_SECOND}")
        moment = _EPOCH + timedelta(seconds=value)
    elif isinstance(value, str) and _ISO.fullmatch(value):
        moment = datetime.fromisoformat(value.upper())
    else:
        raise ValueError("expected epoch seconds, an ISO 8601 string such as 2024-05-01T12:00:00Z, or null")
    if moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("the time lies outside the years 1 to 9999 in UTC") from error


Time = Annotated[
    datetime | None,
    BeforeValidator(read_time),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": _FIRST_SECOND, "maximum": _LAST_SECOND},
                {"type": "string", "format": "date-time"},
                {"type": "string", "format": "date"},
                {"type": "null"},
            ],
            "description": "epoch seconds, an ISO 8601 string (UTC where it names no offset) or null",
        }
    ),
]


class ScoreRequest(BaseModel):
    """One title of one story."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field(min_length=1, max_length=MAX_TITLE, pattern=r"\S")
    by: str | None = Field(default=None, max_length=MAX_BY, description="the submitter; null or empty where unknown")
    time: Time = None
    scraped_body: str = Field(max_length=MAX_BODY, description="the article; cut at its end where it is too long")
    url: str | None = Field(default=None, max_length=MAX_URL, description="null or empty where unknown")


class ScoreAnswer(BaseModel):
    """What the reward model says of one title."""

    score: float = Field(description="predicted log upvotes, as the model gives it")
    version: str = Field(description="first digits of the SHA-256 of the weights")


class HealthAnswer(BaseModel):
    """The model answered, just now."""

    status: Literal["ok"] = "ok"
    model: str = Field(description="folder or hub name")
    version: str
    device: str
    dtype: str
    max_length: int = Field(description="tokens that the model reads; longer bodies are cut")
    score: float = Field(description="the score of a tiny text, computed for this answer")
    waiting: int = Field(description="texts in the queue")


class ErrorAnswer(BaseModel):
    """Why there is no score."""

    error: str = Field(description="one word for programs")
    message: str = Field(description="one sentence for people")
