"""The starter world: seeded, split cleanly, told in full sentences, with titles whose support is known."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.starter import texts, words, world
from tasks.starter.reward_labels import label, prediction_quality
from tasks.starter.train_reward import half_of

STORIES = world.generate_stories(1500)


def test_the_seed_decides_everything_and_a_longer_list_begins_with_a_shorter_one():
    assert world.generate_stories(40) == STORIES[:40]
    assert world.generate_stories(40, seed=7) != STORIES[:40]


def test_no_two_stories_share_an_id_or_a_body():
    assert len({story.id for story in STORIES}) == len(STORIES)
    assert len({story.scraped_body for story in STORIES}) == len(STORIES)


def test_every_split_has_its_share():
    shares = {
        split: sum(story.split == split for story in STORIES) / len(STORIES) for split in ("train", "val", "test")
    }
    assert shares["train"] == pytest.approx(0.84, abs=0.03)
    assert shares["val"] == pytest.approx(0.08, abs=0.03)
    assert shares["test"] == pytest.approx(0.08, abs=0.03)


def test_the_reward_models_halves_are_disjoint_and_even():
    halves = [half_of(story.id) for story in STORIES if story.split == "train"]
    assert set(halves) == {0, 1}
    assert np.mean(halves) == pytest.approx(0.5, abs=0.05)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_a_tale_has_8_to_14_sentences_and_tells_the_facts_of_its_titles(number: int):
    tale = world.tell(random.Random(number))
    sentences = re.findall(r"[.!?](?:\s|$)", tale.body)
    assert 8 <= len(sentences) <= 14
    assert "{" not in tale.body
    titles = world.supported_titles(tale)
    assert set(titles) == set(world.STYLE_EFFECT)
    for title in (title for found in titles.values() for title in found):
        assert "{" not in title
        for figure in re.findall(r"\d+", title):
            assert re.search(rf"\b{figure}\b", tale.body), (title, tale.body)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_an_unsupported_title_is_never_a_supported_one(number: int):
    rng = random.Random(number)
    tale = world.tell(rng)
    supported = {title for found in world.supported_titles(tale).values() for title in found}
    style, title = world.unsupported_title(rng, tale)
    assert title not in supported
    assert style in world.STYLE_EFFECT
    assert world.supported_title(rng, tale)[1] in supported


def test_a_third_of_the_wrong_figures_are_told_of_something_else():
    rng = random.Random(5)
    told = asked = 0
    for _ in range(600):
        tale = world.tell(rng)
        _, title = world.unsupported_title(rng, tale)
        wrong = [figure for figure in re.findall(r"\d+", title) if figure != re.findall(r"\d+", tale.slots["n"])[0]]
        if wrong:
            asked += 1
            told += any(re.search(rf"\b{figure}\b", tale.body) for figure in wrong)
    assert asked > 50
    assert told / asked > 0.3


def test_scores_follow_the_documented_distribution():
    residuals, logs = [], []
    for story in STORIES:
        rng = random.Random(story.id)
        tale = world.tell(rng)
        style, title = world.human_title(rng, tale)
        assert title == story.title
        assert story.time is not None
        mean = world.expected_log_score(tale, style, title, story.by, story.time)
        if story.score > 3:  # below that, rounding to whole upvotes hides the noise
            residuals.append(math.log(story.score) - mean)
        logs.append(math.log(story.score))
    assert np.std(residuals) == pytest.approx(world.SCORE_NOISE, abs=0.12)
    assert np.std(logs) > 1.0
    assert min(story.score for story in STORIES) >= 1


def test_titles_of_better_styles_score_higher():
    by_style: dict[str, list[float]] = {}
    for story in STORIES:
        rng = random.Random(story.id)
        style, _ = world.human_title(rng, world.tell(rng))
        by_style.setdefault(style, []).append(math.log(story.score))
    means = {style: np.mean(scores) for style, scores in by_style.items()}
    assert means["cause"] > means["figure"] > means["plain"] > means["vague"]


def test_every_kind_has_its_own_reasons_and_factual_titles():
    assert set(words.REASONS) == set(texts.KINDS)
    for kind in texts.KINDS.values():
        assert set(kind.titles) == {"figure", "cause", "plain", "how"}


def test_label_is_the_log_of_the_score():
    assert label(100) == pytest.approx(4.60517)
    assert label(1) == label(0) == 0.0


def test_prediction_quality_against_known_values():
    figures = prediction_quality([1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 4.0, 3.0], constant=2.5)
    assert figures["rmse"] == pytest.approx(math.sqrt((0 + 0 + 1 + 4) / 4))
    assert figures["rmse_baseline"] == pytest.approx(math.sqrt((2.25 + 0.25 + 2.25 + 0.25) / 4))
    assert figures["pearson"] == pytest.approx(4.5 / math.sqrt(8.75 * 5.0))
    assert figures["spearman"] == pytest.approx(0.8)


def test_prediction_quality_shares_the_ranks_of_ties():
    assert prediction_quality([1.0, 1.0, 2.0], [3.0, 3.0, 9.0], constant=0.0)["spearman"] == pytest.approx(1.0)


def test_prediction_quality_refuses_labels_without_spread():
    with pytest.raises(ValueError, match="spread"):
        prediction_quality([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], constant=2.0)
