"""Which stories a reward model learns from, and which data it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tasks.reward_training.stories import NO_DATE, LabelledStories, labelled_stories
from tasks.titles.config import RewardTraining
from tasks.titles.errors import DataError
from tasks.titles.rows import read_rows

FIRST_DAY = datetime(2024, 1, 1, 12, tzinfo=UTC)


def row(number: int, **changes: Any) -> dict[str, Any]:
    """Story `number`: a day later and with another score than the one before."""
    values = {
        "id": number,
        "by": "dang",
        "time": (FIRST_DAY + timedelta(days=number)).timestamp(),
        "title": f"Title {number}",
        "url": "",
        "score": number + 1,
        "scraped_body": f"Body {number}",
    }
    return {**values, **changes}


def labelled(rows: Sequence[dict[str, Any]], **settings: Any) -> LabelledStories:
    return labelled_stories(read_rows("tests", rows), RewardTraining.model_validate(settings))


def ids(found: LabelledStories, split: Any) -> set[int]:
    return {int(story.id) for story in found.by_split[split]}


def by_column(*splits: str) -> list[dict[str, Any]]:
    return [row(number, split=split) for number, split in enumerate(splits)]


def test_the_sources_own_splits_are_kept() -> None:
    found = labelled(by_column("train", "test", "train", "validation", "test", "val"))
    assert (ids(found, "train"), ids(found, "val"), ids(found, "test")) == ({0, 2}, {3, 5}, {1, 4})
    assert "own" in found.rule and not found.dropped
    assert found.train_mean == pytest.approx(math.log(3) / 2)  # scores 1 and 3


def test_a_split_that_the_source_does_not_name_is_not_made_up() -> None:
    assert set(labelled(by_column("train", "train", "val", "val")).by_split) == {"train", "val"}


def test_everything_after_the_training_period_is_test_whatever_the_column_says() -> None:
    rows = [row(number, split="train") for number in range(400)]
    found = labelled(rows, train_until="2024-10-26")  # day 299
    assert ids(found, "test") == set(range(300, 400))
    assert ids(found, "train") | ids(found, "val") == set(range(300))
    assert 5 <= len(found.by_split["val"]) <= 30
    assert "2024-10-26" in found.rule


def test_without_a_column_the_newest_tenth_is_test() -> None:
    found = labelled([row(number) for number in range(400)])
    assert ids(found, "test") == set(range(360, 400))
    latest = max(story.time for story in found.by_split["train"] + found.by_split["val"])
    assert all(story.time.date() > latest.date() for story in found.by_split["test"])


def test_stories_of_one_day_are_never_parted() -> None:
    rows = [row(number, time=(FIRST_DAY + timedelta(days=number // 25)).timestamp()) for number in range(400)]
    assert ids(labelled(rows), "test") == set(range(375, 400))  # the 360th story's day is the last of training


def test_what_is_left_out_is_counted() -> None:
    rows = by_column(*["train"] * 4, *["test"] * 4)
    rows[0]["scraped_body"] = " "
    rows[1]["title"] = ""
    rows[4]["scraped_body"] = rows[2]["scraped_body"]
    rows[5]["score"] = 0
    rows += [row(8, split="train", id=9), row(9, split="train", time=None), row(10, split="holiday")]
    found = labelled(rows, minimum_score=1)
    assert ids(found, "train") == {3, 9} and ids(found, "test") == {4, 6, 7}
    assert found.dropped == {
        "empty body": 1,
        "empty title": 1,
        "duplicate body": 1,  # the copy outside train stays
        "duplicate id": 1,
        "score below the minimum": 1,
        "unknown split": 1,
    }


def test_a_story_without_a_date_cannot_be_split_by_time() -> None:
    rows = [row(number, time=None if number < 7 else row(number)["time"]) for number in range(300)]
    found = labelled(rows)
    assert found.dropped == {NO_DATE: 7}
    assert found.as_line().endswith("7 dropped")


def test_the_order_of_the_source_changes_nothing() -> None:
    rows = [row(number) for number in range(200)]
    found = labelled(rows)
    assert labelled(rows[::-1]) == found
    assert found.sample("train", 5) == found.by_split["train"][:5]
    assert [int(story.id) for story in found.by_split["train"]] != sorted(ids(found, "train"))


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (by_column("train", "train", "test", "test"), {"minimum_score": 4}, "leaves 0 train stories"),
        (by_column("train", "train", "test"), {}, "leaves 1 test stories, expected at least 2"),
        (by_column("val", "val", "test", "test"), {}, "leaves 0 train stories"),
        ([row(number) for number in range(300)], {"train_until": "2030-01-01"}, "leaves 0 test stories"),
        ([row(number, time=None) for number in range(9)], {}, "no split column and no usable date"),
        ([row(number, score=7) for number in range(300)], {}, "same label (score 7)"),
        ([row(number, score=number % 2) for number in range(300)], {}, "same label"),  # 0 and 1 are one label
        ([*by_column("train", "train"), row(2, split="train", score=math.nan)], {}, "1 rows have no usable score"),
        ([row(0, split="train", score=None), row(1, split="test", score=1.5)], {}, "2 rows have no usable score"),
    ],
)
def test_data_that_teach_nothing_are_refused(rows: list[dict[str, Any]], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as raised:
        labelled(rows, **settings)
    assert words in str(raised.value)
