"""A typed client of a reward server, this project's own or vLLM. It retries what is transient and nothing else."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from reward_server.dialects import Dialect, Health, OwnDialect, RewardInput, Score
from reward_server.schemas import MAX_BATCH
from reward_server.vllm_dialect import VllmDialect
from tasks.titles.errors import ConfigError, ServiceError, ServiceRejected, ServiceUnavailable
from tasks.titles.together import together

logger = logging.getLogger(__name__)

_TRANSIENT_STATUSES = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
_VLLM_PREFIX = "vllm+"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class RewardClient:
    """Use it as an async context manager; it keeps its connections open in between.

    Every method raises `ServiceUnavailable` when the server is down, slow or overloaded after all retries, and
    `ServiceRejected` when it refuses the request or its answer is unusable.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 60.0, retries: int = 4) -> None:
        """`base_url` is `http://host:port`, or `vllm+http://host:port` for vLLM's pooling runner; or https.

        `timeout_s` bounds each attempt; there are `retries` + 1 of them.
        """
        parts = urlsplit(base_url)
        scheme = parts.scheme.removeprefix(_VLLM_PREFIX)
        if scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(
                f"'{base_url}' is no address of a reward server; expected http://host:port, or vllm+http://host:port "
                "for vLLM."
            )
        self.base_url = base_url.rstrip("/")
        """The address as another client needs it."""
        self.options = {"base_url": base_url, "api_key": api_key, "timeout_s": timeout_s, "retries": retries}
        """What makes another client like this one."""
        dialect = OwnDialect if scheme == parts.scheme else VllmDialect
        self._dialect: Dialect = dialect(self._request, self.base_url)
        self._retries = retries
        self._client = httpx.AsyncClient(
            base_url=parts._replace(scheme=scheme).geturl(),
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
        return await self._dialect.score(item)

    async def score_batch(self, items: Sequence[RewardInput]) -> list[Score]:
        """Return the score of each title, in order; long lists travel in several requests, one after another."""
        scores: list[Score] = []
        for start in range(0, len(items), MAX_BATCH):
            scores.extend(await self._dialect.score_batch(items[start : start + MAX_BATCH]))
        return scores

    async def score_each(self, items: Sequence[RewardInput]) -> list[Score | ServiceError]:
        """Return for each title, in order, its score or why it has none.

        A batch that the server refuses is asked for title by title: the others of it do not suffer.
        """
        if len(items) == 1:
            return [await self._score_or_error(items[0])]
        try:
            return list(await self.score_batch(items))
        except ServiceUnavailable as error:
            return [error] * len(items)
        except ServiceRejected as error:
            logger.warning("A batch of %d titles is scored title by title: %s", len(items), error)
        return await together(self._score_or_error(item) for item in items)

    async def _score_or_error(self, item: RewardInput) -> Score | ServiceError:
        try:
            return await self.score(item)
        except ServiceError as error:
            return error

    async def health(self) -> Health:
        """Ask the server for the score of a tiny text and what model it runs."""
        return await self._dialect.health()

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
                    rejected = ServiceRejected(f"{method} {self.base_url}{path} was refused with {problem}")
                    rejected.status = response.status_code
                    raise rejected
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


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds that `Retry-After` names, 0 where it names none; its form as a date is not read."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), _LONGEST_PAUSE_S) if value.isdecimal() else 0.0
