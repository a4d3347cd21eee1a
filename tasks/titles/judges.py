"""The two judges of a title, asked at the same time: the reward model's score and the validator's verdict."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.titles.chat import ask
from tasks.titles.errors import ServiceError, UnreadableVerdict
from tasks.titles.prompts import validator_messages
from tasks.titles.rewards import reward
from tasks.titles.story import Story
from tasks.titles.verdict import parse_verdict

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from reward_server.client import RewardClient

# "False." is at most five tokens even where a small vocabulary spells it out; anything longer is no verdict.
VERDICT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judges said of one title."""

    score: float
    version: str
    """The reward model's version, as its server reports it."""
    verdict: bool

    @property
    def reward(self) -> float:
        """The reward that follows from score and verdict."""
        return reward(self.score, self.verdict)


class Judges:
    """The reward server and the base model, behind one call."""

    def __init__(self, *, reward_client: RewardClient, validator: AsyncOpenAI, base_model_name: str) -> None:
        from reward_server.joined import JoinedScores

        self._scores = JoinedScores(reward_client)
        self._validator = validator
        self._base_model_name = base_model_name

    async def judge(self, story: Story, title: str) -> Judgement:
        """Ask both judges at the same time.

        Raises `ServiceError` with its `service` set when either has no usable answer; there is no
        judgement from one judge alone.
        """
        # Both are waited for, so that no request of a failed trajectory is left under way.
        score, verdict = await asyncio.gather(
            self._score(story, title), self._verdict(story, title), return_exceptions=True
        )
        if isinstance(score, BaseException):
            raise score
        if isinstance(verdict, BaseException):
            raise verdict
        return Judgement(score=score[0], version=score[1], verdict=verdict)

    async def _score(self, story: Story, title: str) -> tuple[float, str]:
        from reward_server.client import RewardInput

        try:
            answer = await self._scores.score(RewardInput.from_story(story, title))
        except ServiceError as error:
            error.service = "reward model"
            raise
        return answer.score, answer.version

    async def _verdict(self, story: Story, title: str) -> bool:
        choice, *_ = await ask(
            self._validator,
            "validator",
            model=self._base_model_name,
            messages=validator_messages(story.scraped_body, title),
            temperature=0.0,
            max_tokens=VERDICT_TOKENS,
        )
        try:
            return parse_verdict(choice.message.content or "")
        except UnreadableVerdict as error:
            error.service = "validator"
            raise
