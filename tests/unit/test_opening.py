"""A body's first sentence, whole and as a title, of bodies as pages really give them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.starter.world import generate_stories
from tasks.titles.opening import TITLE_LENGTH, cut, first_sentence, opening_sentence

ABBREVIATED = "Dr. Smith of the U.S. Army wrote 3.5 pages, e.g. on tanks."
NO_STOP = (
    "we kept adding features until nobody could say what the product was for any more or why it had ever been built"
)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("It works. And more.", "It works."),
        ("# Our migration\n\nWe moved to Postgres. It took a year.", "We moved to Postgres."),
        ("Our migration\n=============\nWe moved to Postgres.", "We moved to Postgres."),
        ("## Only\n### headings", "Only"),
        (f"{ABBREVIATED} Then he left.", ABBREVIATED),
        ("Published by Acme Inc. The rest is silence.", "Published by Acme Inc. The rest is silence."),
        ("He said no. Then he left.", "He said no."),
        ("We went from v1.2 to v2.0 on example.com today. Great.", "We went from v1.2 to v2.0 on example.com today."),
        ("https://example.com/a.html\n\n![A plot](plot.png)\n\nLatency fell. See below.", "Latency fell."),
        ("See [the docs](https://example.com/x.html) for **bold** `claims`! Yes.", "See the docs for bold claims!"),
        ("snake_case_names and 2*3*4 stay as they are. Next.", "snake_case_names and 2*3*4 stay as they are."),
        ("```python\nx = 1. Y\n```\nThe code above is wrong. Why?", "The code above is wrong."),
        ("```\nnothing but code", "``` nothing but code"),
        ("* First item\n* Second item", "First item"),
        ("> Quoted. Then more.", "Quoted."),
        ("---\n\nA line\nthat wraps. Next.", "A line that wraps."),
        ("What now? Nothing.", "What now?"),
        ('He said "Stop." Then he left.', 'He said "Stop."'),
        ("\u201cStop.\u201d He left.", "\u201cStop.\u201d"),
        ("Wait... what? No.", "Wait... what?"),
        ("東京は大きい。次の文。", "東京は大きい。"),
        (NO_STOP, NO_STOP),
        (" \n\t\n", ""),
    ],
)
def test_the_first_sentence_of_a_body(body: str, sentence: str) -> None:
    assert opening_sentence(body) == sentence


@pytest.mark.parametrize(
    ("body", "title"),
    [
        ("It works. And more.", "It works"),
        ("What now? Nothing.", "What now?"),
        (NO_STOP, "we kept adding features until nobody could say what the product was for any more"),
        ("a" * 200, "a" * TITLE_LENGTH),
        ("", ""),
    ],
)
def test_as_a_title_it_has_no_full_stop_and_whole_words(body: str, title: str) -> None:
    assert first_sentence(body) == title


def test_a_cut_drops_the_comma_that_it_leaves() -> None:
    assert cut("one, two, three", 9) == "one, two"
    assert cut("one, two", 8) == "one, two"


@given(st.text(), st.integers(1, 120))
def test_any_body_gives_one_line_within_the_limit(body: str, limit: int) -> None:
    title = first_sentence(body, limit)
    assert len(title) <= limit
    assert len(title.splitlines()) <= 1


def test_every_starter_story_opens_with_a_sentence() -> None:
    for story in generate_stories(200):
        sentence = opening_sentence(story.scraped_body)
        assert sentence in story.scraped_body and sentence[-1] in ".?!"
