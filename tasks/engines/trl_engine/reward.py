"""TRL's reward function: the reward server scores a batch of titles while the local validator judges it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import statistics
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from reward_server.client import RewardClient, RewardInput, Score
from tasks.engines.trl_engine.validator import LocalValidator, Verdict
from tasks.titles.errors import ServiceError, UnreadableVerdict
from tasks.titles.group_statistics import has_spread
from tasks.titles.judges import Judgement
from tasks.titles.rollout import Failure, Rollout, RolloutGroup, check_failures
from tasks.titles.story import Prompt, Story

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Row = tuple[Prompt, Rollout | Failure]

# A group without spread hands over its mean as a multiple of this power of two, which is about the judges' noise:
# so few binary digits that TRL's sum over the group, in float32, is exact and every advantage exactly 0.
_MEAN_UNIT = 2.0**-13


@dataclass(frozen=True, slots=True)
class Judged:
    """What was judged since the last look."""

    rows: list[Row]
    """Each title or failure of all processes with its prompt, in TRL's order."""
    seconds: float
    neither: float | None
    """Mean share of probability that the validator gave neither True nor False; None where it judged nothing."""


class TitleRewards:
    """The reward function for `GRPOTrainer`; close it after training.

    In a training on several processes each has one of its own and judges its own slice of the batch. They exchange
    what came of it, so that all of them see whole groups and stop for the same reason.
    """

    __name__ = "title_reward"
    """What TRL calls the function in its logs."""

    def __init__(
        self,
        *,
        stories: Mapping[str, Prompt],
        validator: LocalValidator,
        reward_model_url: str,
        reward_model_api_key: str | None,
        max_failed_share: float,
    ) -> None:
        """`stories` has every prompt of the data set by its story's id."""
        self._stories = stories
        self._validator = validator
        self._max_failed_share = max_failed_share
        self._client = RewardClient(reward_model_url, reward_model_api_key)
        # The client's connections belong to one event loop, and TRL calls from outside of any.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()
        self._rows: list[Row] = []
        self._neither: list[float] = []
        self._seconds = 0.0

    def close(self) -> None:
        """Close the connections to the reward server and end the thread that holds them."""
        self._submit(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Mapping[str, str]]],
        completion_ids: Sequence[Sequence[int]],
        story_id: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        """Return the reward of each completion, None for one that has none: TRL leaves that row out of its group.

        `story_id` is a column of the data set; `prompts` are its prompts, which the stories tell better. Raises
        `TooManyFailures` when more than `max_failed_share` of all processes' rows failed.
        """
        started = time.monotonic()
        items = [
            (self._stories[story], completion[0]["content"], len(ids))
            for story, completion, ids in zip(story_id, completions, completion_ids, strict=True)
        ]
        outcomes, neither = self._judge(items)
        own = [(prompt, outcome) for (prompt, _, _), outcome in zip(items, outcomes, strict=True)]
        rows: list[Row] = gather_object(own)
        self._rows += rows
        self._neither += gather_object(neither)
        self._seconds += time.monotonic() - started
        check_failures(groups_of(rows), self._max_failed_share)
        first = PartialState().process_index * len(own)
        return [reward for group in _by_story(rows) for reward in _handed_over(group)][first : first + len(own)]

    def judge(self, items: Sequence[tuple[Prompt, str, int]]) -> list[Rollout | Failure]:
        """Return the outcome of each (prompt, title as sampled, number of sampled tokens), in order.

        Neither judge alone makes a reward. What is judged here is not among what `take` returns.
        """
        return self._judge(items)[0]

    def take(self) -> Judged:
        """Return what TRL had judged since the last call of this method, and forget it."""
        judged = Judged(self._rows, self._seconds, statistics.fmean(self._neither) if self._neither else None)
        self._rows, self._neither, self._seconds = [], [], 0.0
        return judged

    def _judge(self, items: Sequence[tuple[Prompt, str, int]]) -> tuple[list[Rollout | Failure], list[float]]:
        """Return the outcomes, and the share of neither True nor False for each title where there is one."""
        started, written = time.monotonic(), time.time()
        titles = [title.strip() for _, title, _ in items]
        # A blank title is the policy's own failure: there is nothing to judge, and it earns nothing.
        pairs = [(prompt.story, title) for (prompt, _, _), title in zip(items, titles, strict=True) if title]
        scoring = self._submit(self._client.score_each([RewardInput.from_story(*pair) for pair in pairs]))
        try:
            verdicts = self._validator.judge(pairs)
            scores = scoring.result()
        finally:
            scoring.cancel()
        seconds = time.monotonic() - started
        judgements = iter([_judgement(*pair) for pair in zip(scores, verdicts, strict=True)])
        outcomes: list[Rollout | Failure] = []
        for (prompt, _, tokens), title in zip(items, titles, strict=True):
            judgement = next(judgements) if title else Judgement(0.0, "", False)
            if isinstance(judgement, ServiceError):
                outcomes.append(_failure(prompt.story, judgement))
                continue
            outcomes.append(
                Rollout(
                    story_id=prompt.story.id,
                    title=title,
                    messages=prompt.messages,
                    choice=None,
                    reward=judgement.reward,
                    score=judgement.score,
                    verdict=judgement.verdict,
                    length=len(title),
                    reward_model_version=judgement.version,
                    seconds=seconds,
                    written=written,
                    tokens=tokens,
                )
            )
        return outcomes, [verdict.neither for verdict in verdicts if verdict.neither is not None]

    def _submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


def groups_of(rows: Sequence[Row]) -> list[RolloutGroup]:
    """Return the trajectory groups of `rows`: consecutive rows of one story."""
    return [
        RolloutGroup(
            prompt=group[0][0],
            rollouts=tuple(outcome for _, outcome in group if isinstance(outcome, Rollout)),
            failures=tuple(outcome for _, outcome in group if isinstance(outcome, Failure)),
        )
        for group in _by_story(rows)
    ]


def _by_story(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(members) for _, members in itertools.groupby(rows, key=lambda row: row[0].story.id)]


def _handed_over(group: Sequence[Row]) -> list[float | None]:
    """Return what TRL gets for each row of a group."""
    rewards = [outcome.reward if isinstance(outcome, Rollout) else None for _, outcome in group]
    valid = [reward for reward in rewards if reward is not None]
    if has_spread(valid) or not valid:
        return rewards
    # TRL divides by the group's standard deviation, however small: rewards that differ by the judges' noise alone
    # would get full-sized advantages. All alike they get none, as in a group that is left out under ART.
    mean = round(statistics.fmean(valid) / _MEAN_UNIT) * _MEAN_UNIT
    return [None if reward is None else mean for reward in rewards]


def _judgement(score: Score | ServiceError, verdict: Verdict | UnreadableVerdict) -> Judgement | ServiceError:
    if isinstance(score, ServiceError):
        score.service = "reward model"
        return score
    if isinstance(verdict, UnreadableVerdict):
        return verdict
    return Judgement(score.score, score.version, verdict.supported)


def _failure(story: Story, error: ServiceError) -> Failure:
    failure = Failure(story.id, f"{error.service}: {type(error).__name__}", str(error))
    logger.warning("Trajectory of story %s dropped (%s): %s", story.id, failure.reason, error)
    return failure
