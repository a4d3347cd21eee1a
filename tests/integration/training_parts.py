"""What the tests of training share: stories, a small profile, a request, and MLflow beside the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tasks.engines.contract import TrainingRequest, TrainingResult
from tasks.engines.resume import stored_state
from tasks.engines.tracker import MlflowTracker
from tasks.engines.trl_engine import launch
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


def tracking_uri(run_dir: Path) -> str:
    return f"sqlite:///{run_dir}/mlflow.db"


def open_tracker(asked: TrainingRequest) -> MlflowTracker:
    """Start the run's MLflow run, or reopen the one that it has."""
    state = stored_state(asked.run_dir, asked.profile.engine)
    return MlflowTracker.open(
        asked.profile,
        run_name=asked.run_name,
        tracking_uri=tracking_uri(asked.run_dir),
        resume_run_id=state.mlflow_run_id if state else None,
    )


async def train_with_trl(asked: TrainingRequest, **options: Any) -> TrainingResult:
    """Train as the flow does, from where the run stands to its end."""
    tracker = open_tracker(asked)
    result = await launch.train(asked, tracker=tracker, **options)
    tracker.finish("FINISHED")
    return result


def titles_of(run_dir: Path, kind: str, step: int) -> list[dict[str, Any]]:
    """Return the titles of a validated step, or those that it was trained on (`rollouts`)."""
    return json.loads((run_dir / kind / f"{step:04d}.json").read_text())
