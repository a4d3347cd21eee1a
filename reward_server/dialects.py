"""What a client asks of a reward server and how it reads the answers: this project's own server."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from tasks.titles.errors import ServiceRejected
from tasks.titles.story import Story

Ask = Callable[[str, str, Any], Awaitable[Any]]
"""Sends method, path and JSON, and returns the JSON of the answer; retries, and raises `ServiceError`."""


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One title of one story; the server checks the sizes."""

    title: str
    scraped_body: str
    by: str = ""
    time: datetime | None = None
    url: str = ""

    @classmethod
    def from_story(cls, story: Story, title: str) -> RewardInput:
        """Return `story` with `title` in place of its own."""
        return cls(title=title, scraped_body=story.scraped_body, by=story.by, time=story.time, url=story.url)


@dataclass(frozen=True, slots=True)
class Score:
    """Predicted log upvotes, and the version of the model that says so."""

    score: float
    version: str


@dataclass(frozen=True, slots=True)
class Health:
    """What the server says of itself; its fields are those of `schemas.HealthAnswer`."""

    model: str
    version: str
    device: str
    dtype: str
    max_length: int
    score: float
    waiting: int


class Dialect(Protocol):
    """One kind of server. Every method raises the `ServiceError` of `Ask`, or `ServiceRejected`."""

    async def score(self, item: RewardInput) -> Score:
        """Return the score of one title."""

    async def score_batch(self, items: Sequence[RewardInput]) -> list[Score]:
        """Return the score of each of at most `MAX_BATCH` titles, in order, from one request."""

    async def health(self) -> Health:
        """Ask for the score of a tiny text and what model answers."""


class OwnDialect:
    """This project's reward server (`reward_server.app`)."""

    def __init__(self, ask: Ask, address: str) -> None:
        """`address` is for messages."""
        self._ask = ask
        self._address = address

    async def score(self, item: RewardInput) -> Score:
        return _score(await self._ask("POST", "/score", _payload(item)))

    async def score_batch(self, items: Sequence[RewardInput]) -> list[Score]:
        answer = await self._ask("POST", "/score/batch", [_payload(item) for item in items])
        if not isinstance(answer, list) or len(answer) != len(items):
            raise ServiceRejected(f"Expected a list of {len(items)} scores from {self._address}, got {answer!r:.200}")
        return [_score(entry) for entry in answer]

    async def health(self) -> Health:
        answer = await self._ask("GET", "/health", None)
        try:
            if not math.isfinite(answer["score"]):
                raise ValueError("the score is no finite number")
            return Health(**{name: answer[name] for name in Health.__slots__})
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceRejected(
                f"{self._address}/health is no health of a reward server ({error!r}): {answer!r:.200}"
            ) from error


def is_finite_number(value: Any) -> bool:
    """Return whether `value`, out of JSON, can be a score."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _payload(item: RewardInput) -> dict[str, Any]:
    # `asdict` would copy each text.
    payload = {name: getattr(item, name) for name in RewardInput.__slots__}
    return {**payload, "time": item.time.isoformat() if item.time is not None else None}


def _score(answer: Any) -> Score:
    value = answer.get("score") if isinstance(answer, dict) else None
    version = answer.get("version") if isinstance(answer, dict) else None
    if not is_finite_number(value) or not isinstance(version, str):
        raise ServiceRejected(f"Expected {{'score': a finite number, 'version': text}}, got {answer!r:.200}")
    return Score(score=float(value), version=version)  # type: ignore[arg-type]
