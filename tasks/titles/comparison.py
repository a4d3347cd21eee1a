"""The comparison of both engines' runs on the test stories: every method's figures, and the differences between them.

A method is what a reader chooses between: the base model, the best of six of its titles, the human titles, the
story's first sentence, and each engine's best and last checkpoints. A trained method has one checkpoint per seed, the
others have no seeds; figures and differences are over seeds and stories alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from tasks.titles.config import EngineName, Profile
from tasks.titles.curves import CurvePoint, TimeSplit
from tasks.titles.errors import ConfigError
from tasks.titles.evaluation import (
    BASE,
    BEST_OF,
    BEST_OF_N,
    FIRST_SENTENCE,
    HUMAN,
    MEASURES,
    EvaluatedTitle,
    Mode,
    story_means,
)
from tasks.titles.group_statistics import JUDGE_NOISE
from tasks.titles.guards import score_alarm, shares, warnings
from tasks.titles.statistics import (
    Interval,
    Table,
    crossed_difference,
    crossed_interval,
    crossed_ratio,
    crossed_win_rate,
)
from tasks.titles.story import Prompt
from tasks.titles.summary import TrainingFacts

Checkpoint = Literal["best", "last"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
COMPARED_MEASURES = ("reward", "score", "heldout_score", "matches")


@dataclass(frozen=True)
class ComparedRun:
    """One run of the comparison; the profile's engine and seed are its own."""

    run_name: str
    profile: Profile
    training: TrainingFacts
    curve: Sequence[CurvePoint]
    time_per_step: TimeSplit
    peak_memory_mb: float | None

    @property
    def engine(self) -> EngineName:
        """The engine that trained it."""
        return self.profile.engine

    @property
    def seed(self) -> int:
        """The seed of its data order, sampling and adapter."""
        return self.profile.seed

    @property
    def trajectories(self) -> int:
        """How many titles it was trained with."""
        return self.curve[-1].trajectories

    @property
    def generated_tokens(self) -> int:
        """How many tokens were sampled for them."""
        return self.curve[-1].tokens

    def step_of(self, checkpoint: Checkpoint) -> int:
        """Return the step of its best or last checkpoint."""
        return self.training.best_step if checkpoint == "best" else self.training.steps

    def writers(self) -> dict[str, int]:
        """Return the run's writers, as an `Evaluator` names them, with the step of each."""
        return {self.writer(checkpoint): self.step_of(checkpoint) for checkpoint in CHECKPOINTS}

    def writer(self, checkpoint: Checkpoint) -> str:
        """Return the writer of the best or last checkpoint's titles: one and the same where they are one."""
        if self.training.steps == self.training.best_step:
            checkpoint = "best"
        return f"{self.run_name}@{checkpoint}"


@dataclass(frozen=True)
class Method:
    """Who writes titles: `writers` are those of the evaluation, one per seed for an engine's checkpoints."""

    id: str
    name: str
    writers: tuple[str, ...]
    modes: tuple[Mode, ...]
    """The first is the one that it is compared in."""
    engine: EngineName | None = None
    checkpoint: Checkpoint | None = None
    seeds: tuple[int | None, ...] = (None,)
    """The seed of each writer."""
    steps: tuple[int, ...] | None = None
    """The step of each writer's checkpoint."""


@dataclass(frozen=True)
class MethodFigures:
    """A method's figures over seeds and stories in one mode."""

    measures: Mapping[str, Interval | None]
    """By the names of `MEASURES`; None where nothing was judged (no held-out model, say)."""
    distinct: float
    """Distinct titles per title over all stories, the mean over seeds: 1 where none comes twice."""
    titles: int
    failed: int
    """Titles without a judgement; no figure counts them."""


@dataclass(frozen=True)
class Difference:
    """What one method has over another on the same stories and, where both have seeds, with the same seeds."""

    after: Method
    before: Method
    measure: str
    difference: Interval
    ratio: Interval | None
    win_rate: Interval | None
    """Share of (seed, story) pairs in which `after` has the higher reward, ties half; None for other measures."""

    @property
    def real(self) -> bool:
        """Whether the interval excludes 0."""
        return self.difference.excludes_zero


@dataclass(frozen=True)
class Guarded:
    """What the guards found in a method's titles of one mode."""

    method: Method
    mode: Mode
    shares: Mapping[str, float]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """The evaluated titles of all runs, and every number that follows from them; raises `ConfigError` for runs that
    cannot be compared: both engines must have run, with the same seeds and one run each.
    """

    profile: Profile
    """Says how the evaluation was done: its stories, its seed and its bootstrap."""
    runs: Sequence[ComparedRun]
    titles: Sequence[EvaluatedTitle]
    prompts: Sequence[Prompt]
    """The test stories."""

    def __post_init__(self) -> None:
        seeds = {engine: [run.seed for run in self.runs_of(engine)] for engine in ENGINES}
        first, *others = seeds.values()
        if not first or any(other != first for other in others) or len(set(first)) < len(first):
            found = ", ".join(f"{engine} {own or 'none'}" for engine, own in seeds.items())
            raise ConfigError(
                "A comparison needs runs of both engines with the same seeds, one run for each seed, so that both face "
                f"the same data and luck; got seeds {found}. Train the missing runs, or name others."
            )

    def runs_of(self, engine: EngineName) -> list[ComparedRun]:
        """Return an engine's runs in the order of their seeds."""
        return sorted((run for run in self.runs if run.engine == engine), key=lambda run: run.seed)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that every engine was trained with."""
        return tuple(run.seed for run in self.runs_of(ENGINES[0]))

    @cached_property
    def methods(self) -> dict[str, Method]:
        """Every method by its id, in the order of the report."""
        return {method.id: method for method in _methods(self)}

    @cached_property
    def by_writer(self) -> dict[tuple[str, Mode], list[EvaluatedTitle]]:
        """The titles by writer and mode, in the order of the stories."""
        found: dict[tuple[str, Mode], list[EvaluatedTitle]] = {}
        for title in self.titles:
            found.setdefault((title.writer, title.mode), []).append(title)
        return found

    def titles_of(self, method: Method, mode: Mode) -> list[list[EvaluatedTitle]]:
        """Return a method's titles, a list for each of its writers."""
        return [self.by_writer[writer, mode] for writer in method.writers]

    @cached_property
    def figures(self) -> dict[tuple[str, Mode], MethodFigures]:
        """The figures by method and mode."""
        return {(method.id, mode): _figures(self, method, mode) for method, mode in self._method_modes()}

    @cached_property
    def differences(self) -> list[Difference]:
        """The differences of sampled titles; those that nobody measured are left out."""
        pairs = [
            (self.methods[after], self.methods[before], measure)
            for after, before, measures in _comparisons()
            for measure in measures
        ]
        found = (_difference(self, *pair) for pair in pairs)
        return [difference for difference in found if difference is not None]

    def difference(self, after: str, before: str, measure: str = "reward") -> Difference | None:
        """Return one of `differences`, None where nobody measured it."""
        for found in self.differences:
            if (found.after.id, found.before.id, found.measure) == (after, before, measure):
                return found
        return None

    @cached_property
    def guards(self) -> list[Guarded]:
        """What the guards found. Human titles and first sentences were written for no judge: they get no warning."""
        bodies = {prompt.story.id: prompt.story.scraped_body for prompt in self.prompts}
        caught = {
            (method.id, mode): shares(
                [
                    (title.title, bodies[title.story_id])
                    for titles in self.titles_of(method, mode)
                    for title in titles
                    if title.title is not None
                ]
            )
            for method, mode in self._method_modes()
        }
        return [
            Guarded(
                method,
                mode,
                caught[method.id, mode],
                warnings(caught[method.id, mode], caught[BASE, mode]) if mode in self.methods[BASE].modes else [],
            )
            for method, mode in self._method_modes()
        ]

    @cached_property
    def alarms(self) -> list[str]:
        """A sentence for each method whose trained-on score rises while the held-out one doesn't."""
        alarms = []
        for method in self.methods.values():
            score, heldout = (self.difference(method.id, BASE, measure) for measure in ("score", "heldout_score"))
            if (method.engine or method.id == BEST_OF_N) and score and heldout:
                alarms.append(score_alarm(method.name, score.difference, heldout.difference))
        return [alarm for alarm in alarms if alarm]

    def table(self, method: Method, mode: Mode, measure: str) -> Table:
        """Return a measure's means per story as [writers, stories], NaN where a story has none."""
        titles = self.titles_of(method, mode)
        means = [story_means(own, own[0].writer, mode, measure) for own in titles]
        return np.array([[own.get(prompt.story.id, np.nan) for prompt in self.prompts] for own in means])

    @property
    def bootstrap(self) -> dict[str, int]:
        """Samples and seed of every interval."""
        return {"samples": self.profile.bootstrap_samples, "seed": self.profile.seed}

    def _method_modes(self) -> list[tuple[Method, Mode]]:
        return [(method, mode) for method in self.methods.values() for mode in method.modes]


def _methods(comparison: Comparison) -> list[Method]:
    methods = [
        Method(BASE, "base model", (BASE,), ("sampled", "greedy")),
        Method(BEST_OF_N, f"base model, best of {BEST_OF}", (BEST_OF_N,), ("sampled",)),
        Method(HUMAN, "human titles", (HUMAN,), ("human",)),
        Method(FIRST_SENTENCE, "first sentence", (FIRST_SENTENCE,), ("text",)),
    ]
    for engine in ENGINES:
        runs = comparison.runs_of(engine)
        methods += [
            Method(
                id=f"{engine}_{checkpoint}",
                name=f"{engine.upper()} {checkpoint}",
                writers=tuple(run.writer(checkpoint) for run in runs),
                modes=("sampled", "greedy"),
                engine=engine,
                checkpoint=checkpoint,
                seeds=tuple(run.seed for run in runs),
                steps=tuple(run.step_of(checkpoint) for run in runs),
            )
            for checkpoint in CHECKPOINTS
        ]
    return methods


def _comparisons() -> list[tuple[str, str, Sequence[str]]]:
    """Return which method is compared with which, and in what."""
    trained = [f"{engine}_{checkpoint}" for engine in ENGINES for checkpoint in CHECKPOINTS]
    first, second = ENGINES
    return [
        *((after, BASE, COMPARED_MEASURES) for after in (BEST_OF_N, HUMAN, *trained)),
        *((f"{engine}_best", before, ("reward",)) for engine in ENGINES for before in (BEST_OF_N, HUMAN)),
        *((f"{second}_{each}", f"{first}_{each}", COMPARED_MEASURES) for each in CHECKPOINTS),
    ]


def _figures(comparison: Comparison, method: Method, mode: Mode) -> MethodFigures:
    measures: dict[str, Interval | None] = {}
    for name in MEASURES:
        table = comparison.table(method, mode, name)
        found = None if np.isnan(table).all() else crossed_interval(table, **comparison.bootstrap)
        measures[name] = found.within(0.0, 1.0) if found and name == "matches" else found
    titles = comparison.titles_of(method, mode)
    texts = [[title.title for title in own if title.title is not None] for own in titles]
    return MethodFigures(
        measures=measures,
        distinct=statistics.fmean(len(set(own)) / len(own) for own in texts if own),
        titles=sum(len(own) for own in titles),
        failed=sum(title.failure is not None for own in titles for title in own),
    )


def _difference(comparison: Comparison, after: Method, before: Method, measure: str) -> Difference | None:
    first, second = (comparison.table(method, method.modes[0], measure) for method in (after, before))
    options: dict[str, Any] = comparison.bootstrap
    if np.isnan(np.asarray(first) - np.asarray(second)).all():
        return None
    wins = crossed_win_rate(first, second, tie=JUDGE_NOISE, **options) if measure == "reward" else None
    return Difference(
        after=after,
        before=before,
        measure=measure,
        difference=crossed_difference(first, second, **options),
        ratio=crossed_ratio(first, second, **options),
        win_rate=wins,
    )
