"""ART's published example as a bare loop: sample, judge, `backend.train` with ART's defaults, and nothing else.

No Prefect, no MLflow, no retries, no checks: what ART itself takes for a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import art
import httpx

from bench.gpu_measures import BareStep
from tasks.titles.prompts import validator_messages
from tasks.titles.story import Prompt


class BareLoop:
    """Rolls out groups of titles for prompts and trains on them."""

    def __init__(self, model: art.TrainableModel, backend: Any, reward_url: str, *, titles: int, tokens: int) -> None:
        """`titles` are written for each prompt, of at most `tokens` tokens."""
        self._model, self._backend = model, backend
        self._titles, self._tokens = titles, tokens
        self._client = model.openai_client()
        self._reward = httpx.AsyncClient(base_url=reward_url, timeout=60.0)

    async def step(self, prompts: Sequence[Prompt], learning_rate: float) -> BareStep:
        """Make one step from `prompts`."""
        started = time.monotonic()
        groups = await self.roll_out(prompts)
        rolled_out = time.monotonic()
        await self._backend.train(self._model, groups, learning_rate=learning_rate)
        choices: list[Any] = [one.messages_and_choices[-1] for group in groups for one in group]
        tokens = sum(len(choice.logprobs.content) for choice in choices)
        return BareStep(rolled_out - started, time.monotonic() - rolled_out, tokens)

    async def roll_out(self, prompts: Sequence[Prompt]) -> list[art.TrajectoryGroup]:
        """Return a group of judged titles for each of `prompts`, all written at the same time."""
        name = self._model.get_inference_name()
        groups: list[Any] = [
            art.TrajectoryGroup(self._title(prompt, name) for _ in range(self._titles)) for prompt in prompts
        ]
        return await art.gather_trajectory_groups(groups)

    async def _title(self, prompt: Prompt, name: str) -> art.Trajectory:
        answer = await self._client.chat.completions.create(
            model=name,
            messages=list(prompt.messages),  # type: ignore[arg-type]
            temperature=1.0,
            max_tokens=self._tokens,
            logprobs=True,
        )
        choice = answer.choices[0]
        score, _ = await asyncio.gather(
            self._score(prompt, choice.message.content or ""), self._verdict(prompt, choice.message.content or "")
        )
        # The verdict is waited for and left out: random weights know neither True nor False.
        return art.Trajectory(messages_and_choices=[*prompt.messages, choice], reward=score)  # type: ignore[list-item]

    async def _score(self, prompt: Prompt, title: str) -> float:
        story = prompt.story
        asked = {
            "title": title,
            "scraped_body": story.scraped_body,
            "by": story.by,
            "time": story.time.isoformat() if story.time else None,
            "url": story.url,
        }
        answer = await self._reward.post("/score", json=asked)
        answer.raise_for_status()
        return float(answer.json()["score"])

    async def _verdict(self, prompt: Prompt, title: str) -> str:
        answer = await self._client.chat.completions.create(
            model="base",
            messages=validator_messages(prompt.story.scraped_body, title),  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=8,
        )
        return answer.choices[0].message.content or ""
