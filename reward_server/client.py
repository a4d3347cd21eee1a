"""A typed client of the reward server. It retries what is transient and nothing else."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from reward_server.schemas import MAX_BATCH
from tasks.titles.errors import ConfigError, ServiceRejected, ServiceUnavailable
from tasks.titles.story import Story

logger = logging.getLogger(__name__)

_TRANSIENT_STATUSES = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


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


class RewardClient:
    """Use it as an async context manager; it keeps its connections open in between.

    Every method raises `ServiceUnavailable` when the server is down, slow or overloaded after all retries, and
    `ServiceRejected` when it refuses the request or its answer is unusable.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 60.0, retries: int = 4) -> None:
        """`timeout_s` bounds each attempt; there are `retries` + 1 of them."""
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"'{base_url}' is no address of a reward server; expected http://host:port.")
        self.base_url = base_url.rstrip("/")
        self._retries = retries
        self._client = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # Waiting for one of the pooled connections is no sign of a slow server.
            timeout=httpx.Timeout(timeout_s, pool=None),
            # A proxy cannot reach this machine's own addresses.
            trust_env=parts.hostname not in _LOOPBACK,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def score(self, item: RewardInput) -> Score:
        """Return the score of one title."""
        return _score(await self._request("POST", "/score", _payload(item)))

    async def score_batch(self, items: Sequence[RewardInput]) -> list[Score]:
        """Return the score of each title, in order; long lists travel in several requests, one after another."""
        scores: list[Score] = []
        for start in range(0, len(items), MAX_BATCH):
            chunk = items[start : start + MAX_BATCH]
            answer = await self._request("POST", "/score/batch", [_payload(item) for item in chunk])
            if not isinstance(answer, list) or len(answer) != len(chunk):
                raise ServiceRejected(
                    f"Expected a list of {len(chunk)} scores from {self.base_url}, got {answer!r:.200}"
                )
            scores.extend(_score(entry) for entry in answer)
        return scores

    async def health(self) -> Health:
        """Ask the server for the score of a tiny text and what model it runs."""
        answer = await self._request("GET", "/health", None)
        try:
            if not math.isfinite(answer["score"]):
                raise ValueError("the score is no finite number")
            return Health(**{name: answer[name] for name in Health.__slots__})
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceRejected(
                f"{self.base_url}/health is no health of a reward server ({error!r}): {answer!r:.200}"
            ) from error

    async def _request(self, method: str, path: str, payload: Any) -> Any:
        problem = ""
        for attempt in range(self._retries + 1):
            pause = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
            try:
                response = await self._client.request(method, path, json=payload)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
            except UnicodeEncodeError as error:
                raise ServiceRejected(f"The text cannot be sent, it holds half a surrogate pair: {error}") from error
            else:
                if response.status_code == 200:
                    return self._json(response)
                problem = f"HTTP {response.status_code}: {response.text:.300}"
                if response.status_code not in _TRANSIENT_STATUSES:
                    raise ServiceRejected(f"{method} {self.base_url}{path} was refused with {problem}")
                pause = max(pause, _retry_after_s(response))
            if attempt < self._retries:
                logger.info("%s %s%s: %s; again in %.1f s", method, self.base_url, path, problem, pause)
                await asyncio.sleep(pause)
        raise ServiceUnavailable(
            f"{method} {self.base_url}{path} failed {self._retries + 1} times, last with {problem}. "
            "Is the reward server running and not overloaded?"
        )

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise ServiceRejected(
                f"{response.request.url} answered something that is not JSON: {response.text:.200}"
            ) from error


def _payload(item: RewardInput) -> dict[str, Any]:
    return {**asdict(item), "time": item.time.isoformat() if item.time is not None else None}


def _score(answer: Any) -> Score:
    value = answer.get("score") if isinstance(answer, dict) else None
    version = answer.get("version") if isinstance(answer, dict) else None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not isinstance(version, str):
        raise ServiceRejected(f"Expected {{'score': a finite number, 'version': text}}, got {answer!r:.200}")
    return Score(score=float(value), version=version)  # type: ignore[arg-type]


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds that `Retry-After` names, 0 where it names none; its form as a date is not read."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), _LONGEST_PAUSE_S) if value.isdecimal() else 0.0
