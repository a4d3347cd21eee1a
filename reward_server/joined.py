"""Joins the titles that are to be scored at the same moment into one request, which costs a server less than many."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reward_server.dialects import RewardInput, Score
from reward_server.schemas import MAX_BATCH
from tasks.titles.errors import ServiceError

if TYPE_CHECKING:
    from reward_server.client import RewardClient

_PAUSE_S = 0.001
"""How long a request waits for further titles: those that a policy's server ended in one step come so soon."""
_MANY = 24
"""Titles that came at once and are worth a request without a pause."""
_MOST_CHARACTERS = 400_000
"""Article text in one request. With long articles requests cost little beside the model, and a slow server should not
have to score many within one timeout."""


@dataclass
class _Request:
    """Titles that travel together."""

    answers: asyncio.Task[list[Score | ServiceError]] | None = None
    items: list[RewardInput] = field(default_factory=list)
    characters: int = 0
    waiting: int = 0
    """Callers that have no answer yet."""


class JoinedScores:
    """Scores single titles through a `RewardClient`; for one event loop."""

    def __init__(self, client: RewardClient) -> None:
        self._client = client
        self._open: _Request | None = None
        """The request that further titles may join."""

    async def score(self, item: RewardInput) -> Score:
        """Return the score of one title; raises what `RewardClient.score` raises.

        A request ends early when all that wait for it have been cancelled.
        """
        request = self._open
        if request is None or not _fits(request, item):
            request = self._open = _Request()
            request.answers = asyncio.create_task(self._send(request), name="reward-model-request")
        place = len(request.items)
        request.items.append(item)
        request.characters += len(item.scraped_body)
        request.waiting += 1
        assert request.answers is not None
        try:
            answer = (await asyncio.shield(request.answers))[place]
        finally:
            request.waiting -= 1
            if request.waiting == 0:
                self._close(request)
                request.answers.cancel()
        if isinstance(answer, ServiceError):
            # One error may be the answer to several titles; each caller may change and raise its own.
            raise copy.copy(answer)
        return answer

    async def _send(self, request: _Request) -> list[Score | ServiceError]:
        # The callers of this turn of the event loop have come when this begins.
        if len(request.items) < _MANY:
            await asyncio.sleep(_PAUSE_S)
        self._close(request)
        return await self._client.score_each(request.items)

    def _close(self, request: _Request) -> None:
        if self._open is request:
            self._open = None


def _fits(request: _Request, item: RewardInput) -> bool:
    return len(request.items) < MAX_BATCH and request.characters + len(item.scraped_body) <= _MOST_CHARACTERS
