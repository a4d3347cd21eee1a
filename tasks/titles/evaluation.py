"""Evaluation on the test stories: who writes the better titles, and by how much.

Every writer (base model, best and last checkpoint) writes for the same stories with the same seeds, and the human
titles face the same judges. A comparison of engines adds two baselines that need no training: the story's first
sentence, and the best of several titles of the base model. A judgement that fails has no figures: it is dropped and
counted, and a story is compared between two writers only where both have one.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from tasks.titles.chat import ask, open_client
from tasks.titles.config import Profile
from tasks.titles.cursor import sampling_seed
from tasks.titles.errors import DataError, ServiceError, TooManyFailures
from tasks.titles.judges import Judges
from tasks.titles.opening import first_sentence
from tasks.titles.rollout import Endpoint
from tasks.titles.statistics import Interval, mean_interval, paired_difference, paired_ratio
from tasks.titles.story import Prompt, Story
from tasks.titles.together import together

if TYPE_CHECKING:
    from reward_server.client import RewardClient

BASE, HUMAN, FIRST_SENTENCE = "base", "human", "first_sentence"
Mode = Literal["sampled", "greedy", "human", "text", "candidate"]
"""How a title came about: sampled at temperature 1, as the likeliest one, by a human, as a piece of the body.
Candidates are sampled, too: the best is chosen among them, and they count for no writer."""
MEASURES = ("reward", "score", "heldout_score", "matches", "length")
"""What is averaged per story; lengths are in characters, `matches` is the share of supported titles."""

# Titles sampled per story and writer: with one, the luck of the draw would be half of an interval's width.
SAMPLED_TITLES = 2
# As many as training samples of one prompt: the choice among them needs a reward model but no training.
BEST_OF = 6
BEST_OF_N = f"best_of_{BEST_OF}"
# Stories under way at once: enough to fill the server's batches, few enough that a story's titles are judged together.
STORIES_AT_ONCE = 8
# Seeds of evaluation differ from those of any training step.
_SEED_STEP = -1


@dataclass(frozen=True, slots=True)
class EvaluatedTitle:
    """One title and what the judges said; what is None was not judged, and `failure` says why."""

    story_id: str
    writer: str
    mode: Mode
    sample: int
    title: str | None
    reward: float | None = None
    score: float | None = None
    heldout_score: float | None = None
    verdict: bool | None = None
    length: int | None = None
    failure: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def measure(self, name: str) -> float | None:
        """Return one of `MEASURES`, None where there is none."""
        value = self.verdict if name == "matches" else getattr(self, name)
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class _Judgement:
    reward: float
    score: float | None
    heldout_score: float | None
    verdict: bool


class Evaluator:
    """Writes and judges titles of one story after another; an async context manager that closes its connections."""

    def __init__(
        self,
        profile: Profile,
        *,
        endpoint: Endpoint,
        writers: Mapping[str, str],
        reward_client: RewardClient,
        heldout_client: RewardClient | None,
        baselines: bool = False,
    ) -> None:
        """`writers` maps a writer's name to the name that the endpoint serves its weights under.

        With `baselines` there are two more: `FIRST_SENTENCE`, and `BEST_OF_N` of the writer `BASE`.
        """
        self._profile = profile
        self._writers = dict(writers)
        self._baselines = baselines
        self._client = open_client(endpoint.base_url, endpoint.api_key, concurrency=profile.rollout_concurrency)
        self._judges = Judges(
            reward_client=reward_client, validator=self._client, base_model_name=endpoint.base_model_name
        )
        self._heldout_client = heldout_client

    async def __aenter__(self) -> Evaluator:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()

    async def evaluate(
        self, prompts: Sequence[Prompt], on_progress: Callable[[int, int], None] | None = None
    ) -> list[EvaluatedTitle]:
        """Return every writer's and the human titles of `prompts`, judged, in the order of the stories.

        Raises `TooManyFailures` where more than the profile's `max_failed_share` have no judgement.
        """
        if not prompts:
            raise DataError("Evaluation needs test stories, got none.")
        gate = asyncio.Semaphore(STORIES_AT_ONCE)
        done = 0

        async def one(prompt: Prompt) -> list[EvaluatedTitle]:
            nonlocal done
            async with gate:
                titles = await self._story(prompt)
            done += 1
            if on_progress:
                on_progress(done, len(prompts))
            return titles

        titles = [title for story in await together(one(prompt) for prompt in prompts) for title in story]
        check_evaluation(titles, self._profile.max_failed_share)
        return titles

    async def _story(self, prompt: Prompt) -> list[EvaluatedTitle]:
        """Let every writer write, then have the story's distinct titles judged at once: they share its body."""
        orders = self._orders()
        written = await together(self._write(prompt, *order) for order in orders)
        orders.append((HUMAN, "human", 0))
        written.append(prompt.story.title.strip())
        if self._baselines:
            orders.append((FIRST_SENTENCE, "text", 0))
            written.append(first_sentence(prompt.story.scraped_body))
        distinct = list(dict.fromkeys(title for title in written if isinstance(title, str)))
        judged = await together(self._judge(prompt.story, title) for title in distinct)
        judgements: dict[str, _Judgement | ServiceError] = dict(zip(distinct, judged, strict=True))
        titles = [
            _row(prompt.story.id, order, title, judgements[title] if isinstance(title, str) else title)
            for order, title in zip(orders, written, strict=True)
        ]
        return [*titles, best_of([title for title in titles if title.writer == BASE])] if self._baselines else titles

    def _orders(self) -> list[tuple[str, Mode, int]]:
        """Return writer, mode and sample of every title that a model writes for a story."""
        modes: tuple[tuple[Mode, range], ...] = (("sampled", range(SAMPLED_TITLES)), ("greedy", range(1)))
        orders = [(writer, mode, sample) for writer in self._writers for mode, samples in modes for sample in samples]
        if self._baselines:
            orders += [(BASE, "candidate", sample) for sample in range(SAMPLED_TITLES, BEST_OF)]
        return orders

    async def _write(self, prompt: Prompt, writer: str, mode: Mode, sample: int) -> str | ServiceError:
        try:
            choice, *_ = await ask(
                self._client,
                "policy",
                model=self._writers[writer],
                messages=prompt.messages,
                temperature=0.0 if mode == "greedy" else self._profile.temperature,
                max_tokens=self._profile.max_completion_tokens,
                # The writers share the seeds, which takes part of the luck out of their difference.
                seed=sampling_seed(self._profile.seed, 0, _SEED_STEP, prompt.story.id, sample),
            )
        except ServiceError as error:
            return error
        return (choice.message.content or "").strip()

    async def _judge(self, story: Story, title: str) -> _Judgement | ServiceError:
        if not title:
            # As in training: nothing to judge, and it earns nothing.
            return _Judgement(reward=0.0, score=None, heldout_score=None, verdict=False)
        # Both are waited for, so that no request of a failed judgement is left under way.
        judgement, heldout = await asyncio.gather(
            self._judges.judge(story, title), self._heldout(story, title), return_exceptions=True
        )
        for outcome in (judgement, heldout):
            if isinstance(outcome, ServiceError):
                return outcome
        if isinstance(judgement, BaseException):
            raise judgement
        if isinstance(heldout, BaseException):
            raise heldout
        return _Judgement(judgement.reward, judgement.score, heldout, judgement.verdict)

    async def _heldout(self, story: Story, title: str) -> float | None:
        if self._heldout_client is None:
            return None
        from reward_server.client import RewardInput

        try:
            return (await self._heldout_client.score(RewardInput.from_story(story, title))).score
        except ServiceError as error:
            error.service = "held-out reward model"
            raise


def _row(
    story_id: str, order: tuple[str, Mode, int], title: str | ServiceError, judgement: _Judgement | ServiceError
) -> EvaluatedTitle:
    writer, mode, sample = order
    text = title if isinstance(title, str) else None
    if isinstance(judgement, ServiceError):
        reason = f"{judgement.service}: {type(judgement).__name__}: {judgement}"
        return EvaluatedTitle(story_id, writer, mode, sample, text, failure=reason)
    return EvaluatedTitle(
        story_id,
        writer,
        mode,
        sample,
        text,
        reward=judgement.reward,
        score=judgement.score,
        heldout_score=judgement.heldout_score,
        verdict=judgement.verdict,
        length=len(text or ""),
    )


def best_of(titles: Sequence[EvaluatedTitle]) -> EvaluatedTitle:
    """Return what `BEST_OF_N` makes of one story's titles of the base model.

    It is the title that the reward model scores highest, with that title's own verdict and reward, so that the choice
    is one that a user could make. Of titles without a score a blank one goes before a failure.
    """
    chosen = max(
        (title for title in titles if title.mode != "greedy"),
        key=lambda title: (title.failure is None, -math.inf if title.score is None else title.score),
    )
    return replace(chosen, writer=BEST_OF_N, mode="sampled", sample=0)


def check_evaluation(titles: Sequence[EvaluatedTitle], max_failed_share: float) -> int:
    """Return how many titles have no judgement.

    Raises `TooManyFailures` where their share is above `max_failed_share`, or none is left of a writer.
    """
    failures = [title for title in titles if title.failure]
    asked: Counter[tuple[str, str]] = Counter((title.writer, title.mode) for title in titles)
    lost: Counter[tuple[str, str]] = Counter((title.writer, title.mode) for title in failures)
    if len(failures) > max_failed_share * len(titles) or any(lost[key] == count for key, count in asked.items()):
        raise TooManyFailures(
            f"{len(failures)} of {len(titles)} titles could not be judged, more than max_failed_share = "
            f"{max_failed_share} allows or all of one writer's. For example: {failures[0].failure}"
        )
    return len(failures)


def story_means(titles: Sequence[EvaluatedTitle], writer: str, mode: Mode, measure: str) -> dict[str, float]:
    """Return each story's mean of one measure over a writer's titles; stories without one are left out."""
    values: dict[str, list[float]] = {}
    for title in titles:
        value = title.measure(measure)
        if title.writer == writer and title.mode == mode and value is not None:
            values.setdefault(title.story_id, []).append(value)
    return {story: statistics.fmean(each) for story, each in values.items()}


@dataclass(frozen=True)
class Figures:
    """One writer's figures over the test stories."""

    writer: str
    mode: Mode
    measures: Mapping[str, Interval | None]
    """An interval by the names of `MEASURES`; None where nothing was judged (no held-out model, say)."""
    distinct: float
    """Distinct titles per title over all stories: 1 where no title comes twice."""
    failed: int
    """Titles without a judgement; no figure counts them."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        intervals = {name: interval.as_dict() if interval else None for name, interval in self.measures.items()}
        return {**intervals, "distinct": self.distinct, "failed": self.failed}


def figures(titles: Sequence[EvaluatedTitle], writer: str, mode: Mode, profile: Profile) -> Figures:
    """Return a writer's means over stories with their 95% bootstrap intervals."""
    chosen = [title for title in titles if title.writer == writer and title.mode == mode]
    texts = [title.title for title in chosen if title.title is not None]
    measures: dict[str, Interval | None] = {}
    for name in MEASURES:
        values = list(story_means(chosen, writer, mode, name).values())
        measures[name] = mean_interval(values, samples=profile.bootstrap_samples, seed=profile.seed) if values else None
    return Figures(
        writer=writer,
        mode=mode,
        measures=measures,
        distinct=len(set(texts)) / len(texts) if texts else 0.0,
        failed=sum(title.failure is not None for title in chosen),
    )


def reward_gain(
    titles: Sequence[EvaluatedTitle], profile: Profile, *, mode: Mode = "sampled", measure: str = "reward"
) -> tuple[Interval, Interval | None]:
    """Return the best checkpoint's reward minus the base model's, and their ratio, over stories that have both.

    Raises `TooManyFailures` where no story has both.
    """
    best, base = (story_means(titles, writer, mode, measure) for writer in ("best", BASE))
    both = [story for story in best if story in base]
    if not both:
        raise TooManyFailures("No test story has a judged title of both the base model and the best checkpoint.")
    after, before = [best[story] for story in both], [base[story] for story in both]
    options = {"samples": profile.bootstrap_samples, "seed": profile.seed}
    return paired_difference(after, before, **options), paired_ratio(after, before, **options)
