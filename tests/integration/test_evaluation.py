"""Evaluation with the real parts: the base model, its best of six titles and the first sentence before the judges."""

from __future__ import annotations

from collections import Counter

import pytest
from training_parts import profile, prompts

from reward_server.client import RewardClient
from tasks.engines.policy_server import serve_checkpoints
from tasks.starter.paths import BASE_MODEL
from tasks.titles.evaluation import EvaluatedTitle, Evaluator
from tasks.titles.opening import first_sentence

STORIES = prompts("test", 3)


async def evaluate(reward_server_url: str, *, baselines: bool) -> list[EvaluatedTitle]:
    own = profile()
    async with (
        serve_checkpoints(own, str(BASE_MODEL), {}) as server,
        RewardClient(reward_server_url) as judge,
        Evaluator(
            own,
            endpoint=server,
            writers={"base": server.base_model_name},
            reward_client=judge,
            heldout_client=None,
            baselines=baselines,
        ) as evaluator,
    ):
        return await evaluator.evaluate(STORIES)


async def test_a_comparison_adds_baselines_and_changes_nothing_else(reward_server_url: str) -> None:
    plain = await evaluate(reward_server_url, baselines=False)
    titles = await evaluate(reward_server_url, baselines=True)
    assert Counter((title.writer, title.mode) for title in plain) == {
        ("base", "sampled"): 6,
        ("base", "greedy"): 3,
        ("human", "human"): 3,
    }
    assert Counter((title.writer, title.mode) for title in titles) == {
        ("base", "sampled"): 6,
        ("base", "greedy"): 3,
        ("human", "human"): 3,
        ("first_sentence", "text"): 3,
        ("base", "candidate"): 12,
        ("best_of_6", "sampled"): 3,
    }
    shared = [title for title in titles if title.mode in ("sampled", "greedy", "human") and title.writer != "best_of_6"]
    assert [title.title for title in shared] == [title.title for title in plain]
    assert [title.reward for title in shared] == pytest.approx([title.reward for title in plain], abs=1e-4)

    for prompt in STORIES:
        own = [title for title in titles if title.story_id == prompt.story.id]
        six = [title for title in own if title.writer == "base" and title.mode != "greedy"]
        (best,) = (title for title in own if title.writer == "best_of_6")
        assert len({title.title for title in six}) > 1
        assert best.score == max(title.score for title in six if title.score is not None)
        assert (best.reward, best.verdict) in {(title.reward, title.verdict) for title in six}
        (sentence,) = (title for title in own if title.writer == "first_sentence")
        assert sentence.title == first_sentence(prompt.story.scraped_body)
        assert sentence.reward is not None
