"""Ranking of titles, and what becomes of a text that is longer than a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from tasks.titles.errors import DataError
from tasks.titles.given_text import GivenText
from tasks.titles.rollout import Rollout
from tasks.titles.suggestions import Suggestions, fitting_prompt, rank


def rollout(title: str, score: float = 1.0, verdict: bool = True) -> Rollout:
    return Rollout(
        story_id="1",
        title=title,
        messages=(),
        choice=None,
        reward=score if verdict else 0.0,
        score=score,
        verdict=verdict,
        length=len(title),
        reward_model_version="v",
        seconds=0.1,
        written=0.0,
        tokens=3,
    )


def test_titles_are_ranked_by_reward_and_then_by_score() -> None:
    written = [
        rollout("false but loud", 9.0, verdict=False),
        rollout("good", 2.0),
        rollout("false", 1.0, verdict=False),
        rollout("best", 3.0),
        rollout("good", 2.0),
        rollout(""),
        rollout("zero", 0.0),
    ]
    ranked = rank(written)
    assert [one.title for one in ranked] == ["best", "good", "zero", "false but loud", "false"]
    assert [one.times for one in ranked] == [1, 2, 1, 1, 1]
    assert [one.supported for one in ranked] == [True, True, True, False, False]


def test_a_title_cannot_break_the_table() -> None:
    found = Suggestions("a.txt", "the base model", None, rank([rollout("two\nlines \x1b[31m")]), 7, 1, 2, 9_000, 4_000)
    assert found.rows() == [{"": "1", "title": "two lines [31m", "reward": "1.00", "score": "1.00", "supported": "yes"}]
    assert found.notes() == [
        "The text was cut to its first 4,000 of 9,000 characters to fit.",
        "1 of 7 titles were blank.",
        "2 titles could not be written or judged, and are left out.",
    ]


def words(body: str) -> tuple[tuple[dict[str, str], ...], int | None]:
    """Two tokens around the body, and one for each word of it."""
    return ({"role": "user", "content": body},), 2 + len(body.split())


@examples(st.text(alphabet="ab \n", max_size=60).map(str.strip).filter(bool), st.integers(3, 12))
def test_a_text_is_cut_between_words_to_as_many_as_fit(text: str, limit: int) -> None:
    prompt = fitting_prompt(GivenText("a.txt", text), limit, words)
    body = prompt.story.scraped_body
    assert prompt.tokens == 2 + len(body.split()) <= limit
    assert body.split() == text.split()[: limit - 2] and text.startswith(body)
    assert prompt.messages[0]["content"] == body


@pytest.mark.parametrize(
    ("limit", "prompt_of"), [(2, words), (10, lambda body: ((), None))], ids=["no room", "unreadable"]
)
def test_a_text_that_makes_no_prompt_is_told(limit: int, prompt_of: object) -> None:
    with pytest.raises(DataError, match=r"a\.txt makes no prompt of at most"):
        fitting_prompt(GivenText("a.txt", "some words"), limit, prompt_of)  # type: ignore[arg-type]
