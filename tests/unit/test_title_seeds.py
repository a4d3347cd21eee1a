"""The seeds of TRL's sampler, which asks by prompt tokens alone, are those of ART's rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from request_parts import prompts, request
from transformers import AutoTokenizer

from tasks.engines.canary import canary_prompt
from tasks.engines.trl_engine.seeds import TitleSeeds
from tasks.starter.paths import BASE_MODEL
from tasks.titles.cursor import VALIDATION_STEP, Cursor
from tasks.titles.rollout import Sampling

SEED, GROUP = 7, 3
TOKENIZER = AutoTokenizer.from_pretrained(str(BASE_MODEL))
A, B, C = prompts("a", "b", "c")


def sampling(step: int, epoch: int = 0) -> Sampling:
    """Return what ART's loop samples with."""
    return Sampling(model="policy", temperature=1.0, run_seed=SEED, step=step, epoch=epoch)


@pytest.fixture
def seeds(tmp_path: Path) -> TitleSeeds:
    return TitleSeeds(request(tmp_path, seed=SEED).profile, TOKENIZER)


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 1), (2, 9)])
def test_a_step_s_titles_have_the_seeds_of_art_s(seeds: TitleSeeds, epoch: int, step: int) -> None:
    seeds.set_step(Cursor(SEED, "", epoch=epoch, index=4, step=step), [B, A])
    for prompt in (A, B):
        ids = seeds.prompt_ids(prompt)
        own = [seeds.seed(ids, generation) for generation in range(GROUP)]
        assert own == [sampling(step, epoch).seed(prompt.story.id, generation) for generation in range(GROUP)]


def test_seeds_follow_the_step(seeds: TitleSeeds) -> None:
    ids = seeds.prompt_ids(A)
    drawn = []
    for epoch, step in ((0, 0), (0, 1), (1, 1)):
        seeds.set_step(Cursor(SEED, "", epoch=epoch, step=step), [A, B])
        drawn += [seeds.seed(ids, generation) for generation in range(GROUP)]
    assert len(set(drawn)) == len(drawn)


def test_a_prompt_that_is_no_story_of_the_step_has_a_seed_of_no_story(seeds: TitleSeeds) -> None:
    canary = tuple(canary_prompt(TOKENIZER))
    before_any_step = seeds.seed(canary, 0)
    seeds.set_step(Cursor(SEED, "", step=3), [A, B])
    known = {seeds.seed(seeds.prompt_ids(prompt), generation) for prompt in (A, B) for generation in range(GROUP)}
    # The story of another step is none of this one's.
    assert seeds.seed(canary, 0) == seeds.seed(seeds.prompt_ids(C), 0) == sampling(3).seed("", 0)
    assert seeds.seed(canary, 0) not in known
    assert before_any_step == sampling(0).seed("", 0)


def test_validation_titles_have_the_seeds_of_art_s_at_every_step(seeds: TitleSeeds) -> None:
    for step in (0, 5):
        seeds.set_step(Cursor(SEED, "", epoch=step, step=step), [A])
        drawn = [seeds.validation_seed(prompt) for prompt in (A, B)]
        assert drawn == [sampling(VALIDATION_STEP).seed(prompt.story.id, 0) for prompt in (A, B)]


def test_prompts_are_tokenized_with_the_opening_of_the_answer(seeds: TitleSeeds) -> None:
    text = TOKENIZER.decode(list(seeds.prompt_ids(A)))
    assert A.story.scraped_body in text
    assert text.endswith("<|im_start|>assistant\n")
    assert text == TOKENIZER.apply_chat_template(list(A.messages), add_generation_prompt=True, tokenize=False)
