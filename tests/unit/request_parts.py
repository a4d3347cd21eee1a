"""What the tests of a run's bookkeeping share: a request for a training that never computes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engines.contract import TrainingRequest
from tasks.titles.config import parse_profile
from tasks.titles.prompts import policy_messages
from tasks.titles.story import Prompt, Story

VALUES: dict[str, Any] = {
    "name": "tests",
    "train_stories": 5,
    "val_stories": 2,
    "test_stories": 1,
    "max_prompt_tokens": 100,
    "groups_per_step": 2,
    "max_steps": 10,
    "learning_rate": {"art": 1e-3, "trl": 1e-3},
}


def prompts(*ids: str) -> list[Prompt]:
    stories = [Story(i, "", None, "T", "", 20, f"Body of {i}", "train") for i in ids]
    return [Prompt(story, policy_messages(story.scraped_body), 50) for story in stories]


def request(run_dir: Path, **changes: Any) -> TrainingRequest:
    return TrainingRequest(
        profile=parse_profile({**VALUES, **changes}, source="tests"),
        run_name="first",
        run_dir=run_dir,
        base_model="base",
        train=prompts("a", "b", "c", "d", "e"),
        val=prompts("v", "w"),
        reward_model_url="http://127.0.0.1:1",
    )
