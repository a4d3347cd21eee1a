"""Produces titles: the policy writes, the judges judge, and what fails is counted instead of scored."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from tasks.titles.chat import RETRIES, ask, open_client
from tasks.titles.cursor import sampling_seed
from tasks.titles.errors import DataError, HnTitlesError, ServiceError, ServiceRejected, TooManyFailures
from tasks.titles.judges import Judges
from tasks.titles.story import Prompt
from tasks.titles.together import together

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice

    from reward_server.client import RewardClient

logger = logging.getLogger(__name__)

MOST_CHOICES = 64
"""Titles that one request asks for at most: servers have bounds of their own."""


class Endpoint(Protocol):
    """The part of an OpenAI-compatible server that rollouts need."""

    base_url: str
    api_key: str
    base_model_name: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """One title, how it came about and what the judges said of it."""

    story_id: str
    title: str
    """Without blanks around it; `choice` holds what was sampled."""
    messages: tuple[dict[str, str], ...]
    choice: Choice | None
    """The policy's answer with a log-probability per sampled token; None where the engine itself keeps the tokens."""
    reward: float
    score: float
    verdict: bool
    length: int
    """Characters of the title."""
    reward_model_version: str
    seconds: float
    written: float
    """`time.time()` when the title was there, and judging began: it may have been on another machine."""
    tokens: int
    """Sampled tokens."""

    @property
    def empty(self) -> bool:
        """Whether the policy wrote nothing; then no judge was asked, and `score` and `verdict` mean nothing."""
        return not self.title


@dataclass(frozen=True, slots=True)
class Failure:
    """A trajectory that has no reward, and why."""

    story_id: str
    reason: str
    """Short and countable: who failed, and how."""
    message: str


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All trajectories of one prompt, the failed ones included."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How titles are sampled. Its seeds differ per story and generation."""

    model: str
    """The name under which the server knows the checkpoint."""
    temperature: float
    run_seed: int
    step: int
    epoch: int = 0

    def seed(self, story_id: str, generation: int) -> int:
        """Return the seed of one title; those of a group follow one another, as a server's choices do."""
        return sampling_seed(self.run_seed, self.epoch, self.step, story_id, generation)


@dataclass(slots=True)
class ServedAt:
    """An endpoint by its address alone."""

    base_url: str
    api_key: str
    base_model_name: str


class Roller:
    """Rolls out trajectories against one policy endpoint; an async context manager that closes its connections."""

    def __init__(
        self,
        *,
        endpoint: Endpoint,
        reward_client: RewardClient,
        max_completion_tokens: int,
        context_tokens: int,
        concurrency: int,
        retries: int = RETRIES,
    ) -> None:
        """`context_tokens` is what the policy's context holds; `concurrency` bounds the titles in the making.

        `retries` is how often the policy and the validator are asked again after a transient failure.
        """
        self.limits = {
            "max_completion_tokens": max_completion_tokens,
            "context_tokens": context_tokens,
            "concurrency": concurrency,
            "retries": retries,
        }
        self.endpoint, self.reward_client = endpoint, reward_client
        self._max_completion_tokens = max_completion_tokens
        self._context_tokens = context_tokens
        self._most_choices = min(concurrency, MOST_CHOICES)
        self._places = _Places(concurrency)
        self._client = open_client(endpoint.base_url, endpoint.api_key, concurrency=concurrency, retries=retries)
        self.judges = Judges(
            reward_client=reward_client, validator=self._client, base_model_name=endpoint.base_model_name
        )

    async def __aenter__(self) -> Roller:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()

    async def group(self, prompt: Prompt, sampling: Sampling, size: int) -> RolloutGroup:
        """Roll out `size` titles of one prompt at the same time.

        What one of this project's errors ends is a `Failure` of the group, one for each title; any other
        exception is a fault of this program and is raised.
        """
        numbers = range(size)
        parts = await together(
            self._titles(prompt, sampling, numbers[first : first + self._most_choices])
            for first in range(0, size, self._most_choices)
        )
        outcomes = [outcome for part in parts for outcome in part]
        return RolloutGroup(
            prompt=prompt,
            rollouts=tuple(outcome for outcome in outcomes if isinstance(outcome, Rollout)),
            failures=tuple(outcome for outcome in outcomes if isinstance(outcome, Failure)),
        )

    async def _titles(self, prompt: Prompt, sampling: Sampling, generations: range) -> list[Rollout | Failure]:
        """Write titles of one prompt and have each judged; one that fails leaves the others alone."""
        async with self._places.taken(len(generations)):
            started = time.monotonic()
            try:
                choices = await self._write(prompt, sampling, generations)
            except HnTitlesError as error:
                return [_failure(prompt, error) for _ in generations]
            written = time.time()
            return await together(self._attempt(prompt, choice, started, written) for choice in choices)

    async def _write(self, prompt: Prompt, sampling: Sampling, generations: range) -> list[Choice]:
        """Have the policy write a title for each of `generations`.

        Raises `DataError` for a prompt that leaves no room in the context, before any call, and
        `ServiceError` when the policy has no usable answer.
        """
        if prompt.tokens + self._max_completion_tokens > self._context_tokens:
            raise DataError(
                f"Story {prompt.story.id}: a prompt of {prompt.tokens} tokens and a title of up to "
                f"{self._max_completion_tokens} do not fit the policy's context of {self._context_tokens}. "
                "Lower max_prompt_tokens."
            )
        choices: list[Choice] = []
        # One request for all of them: the server then reads, renders and tokenises a long prompt once. A server that
        # gives fewer choices than it is asked for is asked again for those that are missing.
        while missing := generations[len(choices) :]:
            answered = await ask(
                self._client,
                "policy",
                model=sampling.model,
                messages=prompt.messages,
                temperature=sampling.temperature,
                max_tokens=self._max_completion_tokens,
                n=len(missing),
                seed=sampling.seed(prompt.story.id, missing[0]),
                logprobs=True,
            )
            choices += answered[: len(missing)]
        return choices

    async def _attempt(self, prompt: Prompt, choice: Choice, started: float, written: float) -> Rollout | Failure:
        try:
            return await self._judged(prompt, choice, started, written)
        except HnTitlesError as error:
            return _failure(prompt, error)

    async def _judged(self, prompt: Prompt, choice: Choice, started: float, written: float) -> Rollout:
        """Have one title judged; raises `ServiceError` when it or a judge's answer is unusable."""
        if choice.logprobs is None or not choice.logprobs.content:
            unusable = ServiceRejected(
                "The policy answered without log-probabilities, which training needs: the server must "
                "support 'logprobs'."
            )
            unusable.service = "policy"
            raise unusable
        title = (choice.message.content or "").strip()
        score, version, verdict, reward = 0.0, "", False, 0.0
        # A blank title is the policy's own failure, not a judge's: there is nothing to judge, and it
        # earns nothing. It is the one reward of 0 besides an unsupported title's, counted on its own.
        if title:
            judgement = await self.judges.judge(prompt.story, title)
            score, version = judgement.score, judgement.version
            verdict, reward = judgement.verdict, judgement.reward
        return Rollout(
            story_id=prompt.story.id,
            title=title,
            messages=prompt.messages,
            choice=choice,
            reward=reward,
            score=score,
            verdict=verdict,
            length=len(title),
            reward_model_version=version,
            seconds=time.monotonic() - started,
            written=written,
            tokens=len(choice.logprobs.content),
        )


class _Places:
    """Bounds how many titles are in the making."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Hold `count` places, no more than there are; whoever came first gets them first."""
        held = 0
        try:
            # One taker at a time: two that each hold a part would wait for each other.
            async with self._turn:
                while held < count:
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()


def _failure(prompt: Prompt, error: HnTitlesError) -> Failure:
    who = error.service if isinstance(error, ServiceError) else "prompt"
    failure = Failure(prompt.story.id, f"{who}: {type(error).__name__}", str(error))
    logger.warning("Trajectory of story %s dropped (%s): %s", prompt.story.id, failure.reason, error)
    return failure


@dataclass(frozen=True)
class GroupRoller:
    """Rolls out one group for each prompt that it is called with; in another process through connections of its own."""

    roller: Roller
    sampling: Sampling
    size: int

    async def __call__(self, prompt: Prompt) -> RolloutGroup:
        """Roll out `size` titles of a prompt."""
        return await self.roller.group(prompt, self.sampling, self.size)

    def __reduce__(self) -> tuple[type[RemoteGroupRoller], tuple[Any, ...]]:
        served, client = self.roller.endpoint, self.roller.reward_client
        endpoint = ServedAt(served.base_url, served.api_key, served.base_model_name)
        return RemoteGroupRoller, (endpoint, client.options, self.roller.limits, self.sampling, self.size)


@dataclass(frozen=True)
class RemoteGroupRoller:
    """What a `GroupRoller` is in another process: it asks the same servers, and keeps no connection between groups."""

    endpoint: ServedAt
    reward_client: Mapping[str, Any]
    limits: Mapping[str, int]
    sampling: Sampling
    size: int

    async def __call__(self, prompt: Prompt) -> RolloutGroup:
        """Roll out `size` titles of a prompt."""
        from reward_server.client import RewardClient

        async with (
            RewardClient(**self.reward_client) as client,
            Roller(endpoint=self.endpoint, reward_client=client, **self.limits) as roller,
        ):
            return await roller.group(prompt, self.sampling, self.size)


def check_failures(groups: Iterable[RolloutGroup], max_failed_share: float) -> int:
    """Return how many trajectories of `groups` failed.

    Raises `TooManyFailures` with the commonest reasons when their share is above `max_failed_share`,
    or when none is left.
    """
    groups = list(groups)
    failures = [failure for group in groups for failure in group.failures]
    asked = len(failures) + sum(len(group.rollouts) for group in groups)
    if failures and (len(failures) > max_failed_share * asked or len(failures) == asked):
        reasons = Counter(failure.reason for failure in failures).most_common(3)
        told = "; ".join(f"{count} times {reason}" for reason, count in reasons)
        example = next(failure.message for failure in failures if failure.reason == reasons[0][0])
        raise TooManyFailures(
            f"{len(failures)} of {asked} trajectories failed, more than max_failed_share = {max_failed_share} allows. "
            f"Reasons: {told}. For example: {example}"
        )
    return len(failures)
