"""What the tests of training share: stories, a small profile and a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tasks.engines.contract import TrainingRequest
from tasks.starter.paths import BASE_MODEL
from tasks.starter.world import generate_stories
from tasks.titles.config import Profile, parse_profile
from tasks.titles.prompts import policy_messages
from tasks.titles.story import Prompt, Split

PROFILE: dict[str, Any] = {
    "name": "tests",
    "seed": 3,
    "train_stories": 7,
    "val_stories": 3,
    "test_stories": 1,
    "max_prompt_tokens": 400,
    "max_completion_tokens": 24,
    "group_size": 3,
    "groups_per_step": 2,
    "max_steps": 3,
    "learning_rate": {"art": 1e-3, "trl": 1e-3},
    "packed_sequence_length": 512,
    "eval_steps": 2,
    "keep_checkpoints": 2,
    "prefect_rollouts": False,
}


def profile(**changes: Any) -> Profile:
    return parse_profile({**PROFILE, **changes}, source="tests")


def prompts(split: Split, count: int) -> list[Prompt]:
    """Return starter stories, the same at every call."""
    own = [story for story in generate_stories(40 * count) if story.split == split][:count]
    tokenizer = AutoTokenizer.from_pretrained(str(BASE_MODEL))
    made = []
    for story in own:
        messages = policy_messages(story.scraped_body)
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        made.append(Prompt(story, messages, len(ids)))
    assert len(made) == count
    return made


def request(run_dir: Path, reward_model_url: str, **changes: Any) -> TrainingRequest:
    own = profile(**changes)
    return TrainingRequest(
        profile=own,
        run_name=run_dir.name,
        run_dir=run_dir,
        base_model=str(BASE_MODEL),
        train=prompts("train", own.train_stories),
        val=prompts("val", own.val_stories),
        reward_model_url=reward_model_url,
    )
