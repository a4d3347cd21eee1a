"""Titles for one text: written by one policy, judged as in training, the best first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.titles.config import Profile
from tasks.titles.errors import DataError
from tasks.titles.given_text import GivenText, printable
from tasks.titles.rollout import Failure, Roller, Rollout, RolloutGroup, Sampling, check_failures
from tasks.titles.story import Prompt

MOST_ROUNDS = 4
"""A policy that is sure of itself writes the same titles again and again; this often it is asked for others."""
# Seeds of suggestions are those of no training step and of no evaluation.
_SEED_STEP = -2


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One title and what the judges say of it."""

    title: str
    reward: float
    score: float
    """Predicted log upvotes."""
    supported: bool
    """The validator's verdict: whether the text supports the title."""
    times: int
    """How often it was written."""


@dataclass(frozen=True, slots=True)
class Suggestions:
    """What came of asking a policy for titles of one text."""

    source: str
    writer: str
    """Who wrote them, as a sentence would call it."""
    version: str | None
    """The registered version, `models:/name/3`; None for a checkpoint of a run and for the base model."""
    titles: Sequence[Suggestion]
    """Distinct ones, by reward and then by score, the best first."""
    written: int
    blank: int
    failed: int
    """Titles that were written or judged without an answer; nothing of them is shown."""
    characters: int
    """Of the text."""
    read: int
    """Characters that the policy and the judges were given: as many as fit the prompt."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def rows(self) -> list[dict[str, str]]:
        """Return the titles as a table's rows of text."""
        return [
            {
                "": str(place),
                "title": printable(" ".join(one.title.split())),
                "reward": f"{one.reward:.2f}",
                "score": f"{one.score:.2f}",
                "supported": "yes" if one.supported else "NO",
            }
            for place, one in enumerate(self.titles, start=1)
        ]

    def notes(self) -> list[str]:
        """Return what a reader should know besides the table."""
        notes = []
        if self.read < self.characters:
            notes.append(f"The text was cut to its first {self.read:,} of {self.characters:,} characters to fit.")
        if self.titles and not any(one.supported for one in self.titles):
            notes.append("The text supports none of these titles: each says something that it does not.")
        if self.blank:
            notes.append(f"{self.blank} of {self.written} titles were blank.")
        if self.failed:
            notes.append(f"{self.failed} titles could not be written or judged, and are left out.")
        return notes


def fitting_prompt(
    given: GivenText, limit: int, prompt_of: Callable[[str], tuple[tuple[dict[str, str], ...], int | None]]
) -> Prompt:
    """Return the prompt of as much of the text, from its beginning, as `limit` tokens hold.

    `prompt_of` returns a body's messages and their tokens, None where the tokenizer cannot read it. Raises `DataError`
    where it cannot, or where not even one word fits.
    """
    body = given.text
    messages, tokens = prompt_of(body)
    fits, beyond = 0, len(body)
    while tokens is not None and tokens > limit and beyond - fits > 1:
        # The longest beginning that is known to fit, and the shortest that is known not to.
        middle = (fits + beyond) // 2
        _, count = prompt_of(body[:middle])
        if count is not None and count <= limit:
            fits = middle
        else:
            beyond = middle
    if tokens is not None and tokens > limit:
        body = body[:fits]
        # A word that is cut in two would be a word that the text does not hold.
        if not given.text[fits].isspace():
            body = body[: max(body.rfind(" "), body.rfind("\n"), 0)]
        body = body.rstrip()
        messages, tokens = prompt_of(body)
    if tokens is None or tokens > limit or not body:
        raise DataError(f"{given.source} makes no prompt of at most {limit} tokens; raise max_prompt_tokens.")
    return Prompt(given.story(body), messages, tokens)


async def write_titles(
    roller: Roller, prompt: Prompt, profile: Profile, *, model: str, count: int
) -> tuple[list[Suggestion], list[Rollout], list[Failure]]:
    """Return up to `count` distinct titles by rank, and everything that was written or failed on the way.

    `model` is the name that the server knows the policy by. Raises `TooManyFailures` where every one failed.
    """
    rollouts: list[Rollout] = []
    failures: list[Failure] = []
    ranked: list[Suggestion] = []
    for turn in range(MOST_ROUNDS):
        sampling = Sampling(model, profile.temperature, profile.seed, _SEED_STEP, epoch=turn)
        group = await roller.group(prompt, sampling, count - len(ranked))
        rollouts += group.rollouts
        failures += group.failures
        # Fewer titles than wanted are still of use, so only none at all ends it.
        check_failures([RolloutGroup(prompt, tuple(rollouts), tuple(failures))], max_failed_share=1.0)
        ranked = rank(rollouts)
        if len(ranked) >= count:
            break
    return ranked, rollouts, failures


def rank(rollouts: Sequence[Rollout]) -> list[Suggestion]:
    """Return the distinct titles, by reward, and those of one reward (the unsupported ones, say) by score."""
    times = Counter(rollout.title for rollout in rollouts)
    distinct = {rollout.title: rollout for rollout in rollouts if not rollout.empty}
    found = [
        Suggestion(title, rollout.reward, rollout.score, rollout.verdict, times[title])
        for title, rollout in distinct.items()
    ]
    return sorted(found, key=lambda one: (one.reward, one.supported, one.score), reverse=True)
