"""Which stories a reward model learns from and which it is judged on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from tasks.starter.reward_labels import label
from tasks.titles.config import RewardTraining
from tasks.titles.errors import DataError
from tasks.titles.filters import Reason, filter_content, filter_duplicates, stable_hash
from tasks.titles.rows import LoadedStories
from tasks.titles.story import SPLITS, Split, Story

NO_DATE = "no date to split by"
TRAIN_SHARE = 0.9
"""Share of the stories, the oldest, that are the training period where neither a date nor splits are given."""
_ONE_IN_VAL = 20
"""One of this many stories of the training period is validation."""


@dataclass(frozen=True)
class LabelledStories:
    """The stories of each split, and an account of the others."""

    source: str
    by_split: Mapping[Split, tuple[Story, ...]]
    """Only splits that there are; train always is. Each is ordered by a hash of the ids."""
    rule: str
    """One sentence on how the splits came about."""
    dropped: Mapping[str, int]
    """Rows that are in no split, by reason."""

    @property
    def train_mean(self) -> float:
        """The mean label of the training stories, in log upvotes."""
        train = self.by_split["train"]
        return sum(label(story.score) for story in train) / len(train)

    def sample(self, split: Split, count: int) -> tuple[Story, ...]:
        """Return at most `count` stories of a split, the same at every call."""
        return self.by_split[split][:count]

    def as_line(self) -> str:
        """Return the counts in a few words."""
        sizes = ", ".join(f"{len(stories)} {split}" for split, stories in self.by_split.items())
        return f"{sizes}, {sum(self.dropped.values())} dropped"


def labelled_stories(loaded: LoadedStories, settings: RewardTraining) -> LabelledStories:
    """Return the stories of `loaded` that have a label and a text, by split.

    The splits are the source's own where it names more than `train` and no last day of training is given. Else they
    go by time: whatever is later than the training period is test, and one in twenty stories of the period validation.

    Raises `DataError` for rows without a usable score (NaN among them), for a split with fewer than two stories, and
    for training stories that all have the same label.
    """
    dropped: Counter[str] = Counter()
    for (_, reason), count in loaded.unusable.items():
        dropped[str(reason)] += count
    if dropped[Reason.NO_SCORE]:
        raise DataError(
            f"{loaded.source}: {dropped[Reason.NO_SCORE]} rows have no usable score (missing, NaN, infinite or no "
            "whole number). A reward model learns from scores alone, so none is guessed: mend or remove these rows."
        )
    stories, unfit = filter_content(loaded.stories, settings.minimum_score)
    by_time = settings.train_until is not None or (loaded.division is not None and loaded.division.of == "train")
    if by_time:
        dated = [story for story in stories if story.time is not None]
        dropped[NO_DATE] += len(stories) - len(dated)
        last_day = settings.train_until or _last_day_of_training(dated)
        stories = [replace(story, split=_split_by_time(story, last_day)) for story in dated]
        expected = SPLITS
        rule = f"Training period up to {last_day}, one story in {_ONE_IN_VAL} of it val; all later stories are test."
    else:
        named = {story.split for story in loaded.stories} | {"train"}
        expected = tuple(split for split in SPLITS if split in named)
        rule = "The splits are the source's own."
    # After the splits are known: of two copies the one outside train stays.
    stories, duplicates = filter_duplicates(stories)
    for _, reason in unfit + duplicates:
        dropped[str(reason)] += 1
    stories.sort(key=lambda story: (stable_hash("reward-training", story.id), story.id))
    by_split = {split: tuple(story for story in stories if story.split == split) for split in expected}
    counts = {reason: count for reason, count in dropped.items() if count}
    found = LabelledStories(loaded.source, by_split, rule, counts)
    _check(found)
    return found


def _check(found: LabelledStories) -> None:
    for split, stories in found.by_split.items():
        if len(stories) < 2:
            reasons = ", ".join(f"{reason} {count}" for reason, count in found.dropped.items()) or "none"
            raise DataError(
                f"{found.source} leaves {len(stories)} {split} stories, expected at least 2. {found.rule} Dropped: "
                f"{reasons}. Give more stories, or another last day with --set reward_training.train_until=2024-12-31."
            )
    train: Sequence[Story] = found.by_split["train"]
    if len({label(story.score) for story in train}) == 1:
        raise DataError(
            f"{found.source}: all {len(train)} training stories have the same label (score {train[0].score}), so there "
            "is nothing to learn. Give stories with different scores."
        )


def _last_day_of_training(stories: Sequence[Story]) -> date:
    days = sorted(story.time.date() for story in stories if story.time is not None)
    if not days:
        raise DataError(
            "The stories have no split column and no usable date to split them by. Add the column split (train, val, "
            "test) or time (seconds since 1970, or ISO dates)."
        )
    return days[math.ceil(TRAIN_SHARE * len(days)) - 1]


def _split_by_time(story: Story, last_day: date) -> Split:
    assert story.time is not None
    if story.time.date() > last_day:
        return "test"
    return "val" if stable_hash("reward-training-val", story.id) % _ONE_IN_VAL == 0 else "train"
