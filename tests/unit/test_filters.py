"""Filters: tables for each reason, and what must hold for any stories."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.titles.filter_report import EXAMPLE_CHARACTERS, FilterReport, account, quantiles
from tasks.titles.filters import (
    Division,
    Dropped,
    Reason,
    choose,
    divide,
    filter_content,
    filter_duplicates,
    filter_length,
    is_blank,
    normalise_body,
)
from tasks.titles.rows import LoadedStories, Repair
from tasks.titles.story import SPLITS, Prompt, Split, Story

STORY = Story("1", "ann", datetime(2024, 5, 1, tzinfo=UTC), "A title", "https://x.example", 25, "A body", "train")
LIMITS: dict[Split, int] = {"train": 3, "val": 2, "test": 1}
HALF = Division("val", {"test": 0.5}, "half")

# Few ids and bodies, so that most lists hold duplicates within and across splits.
STORIES = st.lists(
    st.builds(
        Story,
        id=st.integers(0, 12).map(str),
        by=st.sampled_from(["", "ann"]),
        time=st.sampled_from([None, STORY.time]),
        title=st.sampled_from(["A title", "Another", "", " \u200b"]),
        url=st.just(""),
        score=st.sampled_from([-1, 0, 19, 20, 300]),
        scraped_body=st.sampled_from(["one", "ONE ", "two\n words", "two words", "three", "four", "", "\t\n", "long"]),
        split=st.sampled_from(SPLITS),
    ),
    max_size=40,
)


def lengths_of(stories: list[Story]) -> list[int | None]:
    """A stand-in for token counts: one body has no count, one is too long."""
    return [{"four": None, "long": 1000}.get(story.scraped_body, len(story.scraped_body)) for story in stories]


def run_all(
    stories: list[Story], division: Division | None = None, limits: dict[Split, int] = LIMITS
) -> tuple[list[Prompt], list[Prompt], Dropped, FilterReport]:
    kept, unfit = filter_content(stories, 20)
    kept, duplicates = filter_duplicates(kept)
    lengths = lengths_of(kept)
    prompts, unreadable = filter_length(kept, lengths, 900)
    prompts, moved = divide(prompts, division) if division else (prompts, {})
    chosen, beyond = choose(prompts, limits)
    dropped = unfit + duplicates + unreadable
    loaded = LoadedStories("test", tuple(stories), {("unknown", Reason.BROKEN_LINE): 2}, {}, division)
    return chosen, beyond, dropped, account(loaded, dropped, moved, chosen, beyond, lengths)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"score": 20}, None),
        ({"score": 19}, Reason.LOW_SCORE),
        ({"score": -5}, Reason.LOW_SCORE),
        ({"scraped_body": ""}, Reason.EMPTY_BODY),
        ({"scraped_body": " \n\t\u200b\ufeff\x00"}, Reason.EMPTY_BODY),
        ({"title": ""}, Reason.EMPTY_TITLE),
        ({"title": "\u00a0\u2003"}, Reason.EMPTY_TITLE),
        ({"title": "?"}, None),
        ({"by": "", "url": "", "time": None}, None),
        ({"score": 0, "title": "", "scraped_body": ""}, Reason.LOW_SCORE),
    ],
)
def test_content(change: dict[str, object], reason: Reason | None) -> None:
    story = replace(STORY, **change)  # type: ignore[arg-type]
    kept, dropped = filter_content([story], 20)
    assert (kept, dropped) == (([story], []) if reason is None else ([], [(story, reason)]))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A body", "a  BODY\n", True),
        ("ﬁne café", "fine cafe\u0301", True),
        ("Straße", "STRASSE", True),
        ("a body", "a body.", False),
        ("ab", "a b", False),
    ],
)
def test_normalised_bodies(one: str, other: str, same: bool) -> None:
    assert (normalise_body(one) == normalise_body(other)) is same


def test_visible_text_is_not_blank() -> None:
    assert all(is_blank(text) for text in ("", " ", "\u200b\u2060", "\x00\x07"))
    assert not any(is_blank(text) for text in ("a", ".", " 😀 ", "\ud800"))


@pytest.mark.parametrize("splits", [("train", "val"), ("val", "train"), ("train", "test"), ("test", "val")])
def test_a_copy_in_an_evaluation_split_stays(splits: tuple[Split, Split]) -> None:
    first, second = (replace(STORY, id=str(number), split=split) for number, split in enumerate(splits))
    kept, dropped = filter_duplicates([first, second])
    assert kept[0].split == max(splits, key=SPLITS.index)
    assert [reason for _, reason in dropped] == [Reason.DUPLICATE_BODY]


def test_one_id_with_two_bodies_is_one_story() -> None:
    rows = [STORY, replace(STORY, scraped_body="Another body"), replace(STORY, scraped_body="A third", split="val")]
    kept, dropped = filter_duplicates(rows)
    assert kept == [rows[2]]
    assert [reason for _, reason in dropped] == [Reason.DUPLICATE_ID] * 2


def test_length() -> None:
    stories = [replace(STORY, id=str(number)) for number in range(4)]
    prompts, dropped = filter_length(stories, [900, 901, None, 1], 900)
    assert [(prompt.story.id, prompt.tokens) for prompt in prompts] == [("0", 900), ("3", 1)]
    assert dropped == [(stories[1], Reason.TOO_LONG), (stories[2], Reason.TOKENISER_ERROR)]
    assert prompts[0].messages[1]["content"].endswith("Content: A body")


@given(STORIES, st.sampled_from([None, HALF]))
def test_every_row_is_kept_dropped_or_beyond_the_limit(stories: list[Story], division: Division | None) -> None:
    chosen, beyond, dropped, report = run_all(stories, division)
    assert len(chosen) + len(beyond) + len(dropped) == len(stories)
    assert report.total_came == len(stories) + 2
    assert sum(report.kept.values()) == len(chosen)
    assert sum(report.beyond_limit.values()) == len(beyond)
    assert report.total_dropped == len(dropped) + 2
    assert sum(report.moved.values()) == 0
    assert {reason: sum(part.values()) for reason, part in report.dropped.items()} == {
        **Counter(reason for _, reason in dropped),
        Reason.BROKEN_LINE: 2,
    }


@given(STORIES, st.sampled_from([None, HALF]), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(
    stories: list[Story], division: Division | None, rng: random.Random
) -> None:
    shuffled = rng.sample(stories, len(stories))
    chosen, beyond, _, report = run_all(stories, division)
    assert (chosen, beyond) == run_all(shuffled, division)[:2]
    assert report == run_all(shuffled, division)[3]


@given(STORIES)
def test_filtering_what_was_kept_changes_nothing(stories: list[Story]) -> None:
    chosen, _, _, _ = run_all(stories)
    again, beyond, dropped, _ = run_all([prompt.story for prompt in chosen])
    assert (again, beyond, dropped) == (chosen, [], [])


@given(STORIES, st.sampled_from([None, HALF]))
def test_no_id_and_no_body_is_in_two_places(stories: list[Story], division: Division | None) -> None:
    chosen, beyond, _, _ = run_all(stories, division)
    prompts = chosen + beyond
    for seen in (
        [prompt.story.id for prompt in prompts],
        [normalise_body(prompt.story.scraped_body) for prompt in prompts],
    ):
        assert len(seen) == len(set(seen))


@given(STORIES)
def test_no_story_is_lost_to_its_own_copy(stories: list[Story]) -> None:
    kept, dropped = filter_duplicates(stories)
    bodies = {normalise_body(story.scraped_body) for story in kept}
    for story, reason in dropped:
        if reason is Reason.DUPLICATE_BODY:
            assert normalise_body(story.scraped_body) in bodies
        else:
            assert any(other.id == story.id for other, _ in [*((kept_one, None) for kept_one in kept), *dropped])


def prompts_of(count: int, split: Split) -> list[Prompt]:
    stories = [replace(STORY, id=str(number), scraped_body=f"Body {number}", split=split) for number in range(count)]
    return filter_length(stories, [10] * count, 900)[0]


@given(st.integers(0, 60), st.integers(1, 20))
def test_a_row_more_displaces_at_most_one_prompt(count: int, limit: int) -> None:
    limits: dict[Split, int] = {"train": limit, "val": 1, "test": 1}
    prompts = prompts_of(count + 1, "train")
    before, after = (set(prompt.story.id for prompt in choose(part, limits)[0]) for part in (prompts[:-1], prompts))
    assert len(before - after) <= 1
    assert len(after) == min(limit, count + 1)


def test_the_rest_is_beyond_the_limit() -> None:
    chosen, beyond = choose(prompts_of(5, "train") + prompts_of(5, "test"), LIMITS)
    assert Counter(prompt.story.split for prompt in chosen) == {"train": 3, "test": 1}
    assert Counter(prompt.story.split for prompt in beyond) == {"train": 2, "test": 4}


@pytest.mark.parametrize(("count", "val", "test"), [(1, 0, 1), (2, 1, 1), (4, 2, 2), (100, 50, 50)])
def test_half_of_val_becomes_test(count: int, val: int, test: int) -> None:
    divided, gained = divide(prompts_of(count, "val"), HALF)
    assert len(divided) == count
    assert Counter(prompt.story.split for prompt in divided) == +Counter({"val": val, "test": test})
    assert gained == {"val": -test, "test": test}


@given(st.integers(3, 80))
def test_shares_of_train_leave_something_in_each_split(count: int) -> None:
    divided, _ = divide(prompts_of(count, "train"), Division("train", {"test": 0.05, "val": 0.05}, "shares"))
    sizes = Counter(prompt.story.split for prompt in divided)
    assert sizes["val"] == sizes["test"] == max(1, round(0.05 * count))
    assert sizes["train"] == count - 2 * sizes["val"]


def test_a_report_that_does_not_add_up_is_refused() -> None:
    _, _, _, report = run_all([STORY])
    values = report.as_dict()
    values["kept"] = {}
    with pytest.raises(ValidationError, match="of 1 rows, 0 are accounted for"):
        FilterReport.model_validate(values)


def test_the_report_reads_the_same_from_json() -> None:
    _, _, _, report = run_all([STORY, replace(STORY, id="2", split="val")], HALF)
    assert FilterReport.model_validate_json(report.model_dump_json()) == report
    assert FilterReport.model_validate(report.as_dict()) == report


def test_the_tables_of_the_report() -> None:
    stories = [
        STORY,
        replace(STORY, id="2", scraped_body="Second"),
        replace(STORY, id="3", score=1, split="val"),
        replace(STORY, id="4", scraped_body="Fourth", split="test"),
    ]
    report = run_all(stories, limits={"train": 1, "val": 1, "test": 1})[3]
    assert report.rows() == [
        {"stories": "rows in the source", "train": 2, "val": 1, "test": 1, "unknown": 2, "all": 6},
        {"stories": "dropped: line is no JSON object", "train": 0, "val": 0, "test": 0, "unknown": 2, "all": 2},
        {"stories": "dropped: score below the minimum", "train": 0, "val": 1, "test": 0, "unknown": 0, "all": 1},
        {"stories": "beyond the limit", "train": 1, "val": 0, "test": 0, "unknown": 0, "all": 1},
        {"stories": "prompts", "train": 1, "val": 0, "test": 1, "unknown": 0, "all": 2},
    ]
    assert [row["tokens per prompt"] for row in report.token_rows()] == ["before the length filter", "train", "test"]
    markdown = report.as_markdown()
    assert "| dropped: score below the minimum | 0 | 1 | 0 | 0 | 1 |" in markdown
    assert "The human title: A title" in markdown


def test_an_example_keeps_inside_its_fence_and_is_cut() -> None:
    story = replace(STORY, scraped_body="```` <b>\n" + "x" * 5000)
    prompts, _ = filter_length([story], [10], 900)
    report = account(LoadedStories("test", (story,), {}, {Repair.NO_URL: 1}), [], {}, prompts, [], [10])
    markdown = report.as_markdown()
    assert markdown.count("`````") == 2
    assert "characters more)" in markdown
    assert "x" * EXAMPLE_CHARACTERS not in markdown
    assert "no usable URL: left empty: 1" in markdown


@given(st.lists(st.integers(0, 9000), min_size=1))
def test_quantiles_are_ordered_values_of_the_list(values: list[int]) -> None:
    found = list(quantiles(values).values())
    assert found == sorted(found)
    assert set(found) <= set(values)
    assert (found[0], found[-1]) == (min(values), max(values))
