"""Whether a checkpoint takes the champion's place: better on the same stories before the same judges, and surely so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks.titles.config import Profile
from tasks.titles.errors import ConfigError, DataError, TooManyFailures
from tasks.titles.evaluation import BASE, EvaluatedTitle, story_means
from tasks.titles.ruler import Ruler
from tasks.titles.run_directory import RunDirectory
from tasks.titles.statistics import Interval, paired_difference
from tasks.titles.summary import FEWEST_STORIES

CHAMPION = "champion"
"""The alias of the version that titles are written with."""


@dataclass(frozen=True, slots=True)
class JudgedPolicy:
    """A checkpoint and what its sampled titles earned, story by story."""

    run_name: str
    step: int
    profile: Profile
    ruler: Ruler
    rewards: Mapping[str, float]
    """Mean reward by story id; a story without a judgement is not among them."""

    @property
    def name(self) -> str:
        """How it is called in sentences."""
        return f"{self.run_name}, step {self.step}"

    @property
    def mean(self) -> float:
        """The mean reward over stories."""
        return sum(self.rewards.values()) / len(self.rewards)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "run": self.run_name,
            "step": self.step,
            "profile": self.profile.model_dump(mode="json"),
            "judged_with": self.ruler.as_dict(),
            "rewards": dict(self.rewards),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> JudgedPolicy:
        """Return what `as_dict` was made of; raise `KeyError` or `ValueError` for anything else."""
        return cls(
            run_name=str(values["run"]),
            step=int(values["step"]),
            profile=Profile.model_validate(values["profile"]),
            ruler=Ruler.from_dict(values["judged_with"]),
            rewards={story: float(reward) for story, reward in values["rewards"].items()},
        )

    def judged_again(self, titles: Sequence[EvaluatedTitle], writer: str, ruler: Ruler) -> JudgedPolicy:
        """Return the same checkpoint with the rewards of `writer`'s titles."""
        return replace(self, ruler=ruler, rewards=story_means(titles, writer, "sampled", "reward"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run's best checkpoint, and what the base model earned in the same evaluation."""

    policy: JudgedPolicy
    base: Mapping[str, float]
    """The base model's mean reward by story id."""


@dataclass(frozen=True, slots=True)
class Version:
    """A registered checkpoint."""

    model: str
    """Name of the registered model."""
    number: str
    policy: JudgedPolicy

    @property
    def uri(self) -> str:
        """How MLflow finds it."""
        return f"models:/{self.model}/{self.number}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the candidate becomes champion, and the figures that say so."""

    candidate: Version
    champion: Version | None
    """The champion before the decision."""
    opponent: str
    opponent_mean: float
    candidate_mean: float
    """Means over the stories that both have."""
    difference: Interval | None
    """Candidate minus opponent, story by story; None where the candidate is the champion."""
    stories: int
    judged_again: tuple[str, ...] = ()
    """What differed between the two evaluations, so that both were judged again."""

    @property
    def promoted(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.difference is not None and self.difference.low > 0

    @property
    def reason(self) -> str:
        """The decision in words."""
        name = f"{self.candidate.uri} ({self.candidate.policy.name})"
        if self.difference is None:
            return f"{name} is the champion already."
        told = f"{self.difference.mean:+.3f} ({self.difference.low:+.3f} to {self.difference.high:+.3f})"
        stories = "test story" if self.stories == 1 else "test stories"
        few = f" With {self.stories} {stories} the interval says little." if self.stories < FEWEST_STORIES else ""
        figures = f"Its reward minus that of the other, on the same {self.stories} {stories}: {told}.{few}"
        if self.promoted:
            return f"{name} is the new champion: it is surely above {self.opponent}. {figures}"
        how = "below" if self.difference.high < 0 else "not surely above"
        stays = ", which stays champion" if self.champion else ", and there is no champion yet"
        return f"{name} is not promoted: it is {how} {self.opponent}{stays}. {figures}"

    def markdown(self, links: Sequence[str] = ()) -> str:
        """Return the decision as Markdown; `links` are lines that lead to MLflow and the run directory."""
        head = "Promoted" if self.promoted else "Already champion" if self.difference is None else "Not promoted"
        parts = [f"# {head}: {self.candidate.policy.name}", self.reason]
        if self.difference is not None:
            rows = [
                ("version", self.candidate.number, self.champion.number if self.champion else "-"),
                ("mean reward", f"{self.candidate_mean:.3f}", f"{self.opponent_mean:.3f}"),
            ]
            table = [f"| | candidate | {self.opponent} |", "| --- | --- | --- |"]
            parts.append("\n".join([*table, *(f"| {' | '.join(row)} |" for row in rows)]))
            parts.append(
                f"The alias `{CHAMPION}` of `{self.candidate.model}` moves where the whole 95% interval of the paired "
                "difference is above 0."
            )
        if self.judged_again:
            parts.append(
                f"Both were judged again in one sitting: their evaluations differed in {', '.join(self.judged_again)}."
            )
        parts.append("\n".join(f"* {line}" for line in links))
        return "\n\n".join(part for part in parts if part) + "\n"


def decide(
    candidate: Version, champion: Version | None, base: Mapping[str, float], *, judged_again: Sequence[str] = ()
) -> Decision:
    """Compare a candidate with the champion, or with the base model where there is none.

    `base` is what the base model earned in the candidate's evaluation. Raises `ConfigError` where both were not
    measured with the same stories, judges and sampling, and `TooManyFailures` where no story has both rewards.
    """
    mine = candidate.policy
    if champion is not None and champion.number == candidate.number:
        return Decision(candidate, champion, champion.policy.name, mine.mean, mine.mean, None, len(mine.rewards))
    if champion is None:
        opponent, theirs = "the base model", base
    else:
        different = different_ruler(candidate, champion)
        if different:
            raise ConfigError(
                f"The champion {champion.policy.name} was judged with other {', '.join(different)} than "
                f"{mine.name}: their rewards cannot be compared. Judge both again with the same."
            )
        opponent, theirs = f"{champion.uri} ({champion.policy.name})", champion.policy.rewards
    both = [story for story in mine.rewards if story in theirs]
    if not both:
        raise TooManyFailures(f"No test story has a judged title of both {mine.name} and {opponent}. Evaluate again.")
    after, before = [mine.rewards[story] for story in both], [theirs[story] for story in both]
    return Decision(
        candidate=candidate,
        champion=champion,
        opponent=opponent,
        opponent_mean=sum(before) / len(both),
        candidate_mean=sum(after) / len(both),
        difference=paired_difference(after, before, samples=mine.profile.bootstrap_samples, seed=mine.profile.seed),
        stories=len(both),
        judged_again=tuple(judged_again),
    )


def different_ruler(candidate: Version, champion: Version | None) -> list[str]:
    """Return what the champion was measured with otherwise than the candidate, nothing where it is the candidate."""
    if champion is None or champion.number == candidate.number:
        return []
    return champion.policy.ruler.differences(candidate.policy.ruler)


def check_same_base(candidate: JudgedPolicy, champion: JudgedPolicy) -> None:
    """Raise `ConfigError` where both are adapters of different base models: these share no registered model."""
    if candidate.profile.base_model != champion.profile.base_model:
        raise ConfigError(
            f"The champion {champion.name} is an adapter of {champion.profile.base_model}, {candidate.name} one of "
            f"{candidate.profile.base_model}. Give each base model a name in the registry of its own: "
            "--set registered_name=..."
        )


def read_candidate(run: RunDirectory) -> Candidate:
    """Read what the evaluation of a run left in its folder.

    Raises `DataError` where the run is not evaluated, or its evaluation does not say what it was measured with.
    """
    again = f"Evaluate it with: hn-titles evaluate --run-name {run.name}"
    if run.record().state != "evaluated":
        raise DataError(f"Run '{run.name}' is not evaluated since it was trained. {again}")
    try:
        summary = json.loads(run.summary_path.read_text(encoding="utf-8"))
        lines = (run.path / "titles.jsonl").read_text(encoding="utf-8").splitlines()
        titles = [EvaluatedTitle(**json.loads(line)) for line in lines]
        ruler, step = Ruler.from_dict(summary["judged_with"]), int(summary["best_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The evaluation in {run.path} cannot be read ({error!r}). {again}") from error
    best, base = (story_means(titles, writer, "sampled", "reward") for writer in ("best", BASE))
    if not best or len({title.story_id for title in titles}) != summary["test_stories"]:
        raise DataError(f"{run.path / 'titles.jsonl'} and summary.json are of different evaluations. {again}")
    return Candidate(JudgedPolicy(run.name, step, run.profile, ruler, best), base)


def read_policy(path: Path) -> JudgedPolicy:
    """Read a registered version's evaluation; raise `DataError` where there is none that can be read."""
    try:
        return JudgedPolicy.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as the evaluation of a registered policy: {error!r}") from error
