"""Writes the figures of `bench.gpu_proof.compare` for the starter model as Unsloth loads it; run by a test."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

# First: with it comes Unsloth, before everything that Unsloth rewrites.
import art.unsloth.train

# isort: split

from gradient_parts import Title, pack

from bench.gpu_proof import compare
from tasks.engines.gpu.backend import get_model_config
from tasks.starter.paths import BASE_MODEL
from tasks.starter.world import generate_stories
from tasks.titles.prompts import policy_messages


def main(folder: Path) -> None:
    config = get_model_config(
        str(BASE_MODEL),
        str(folder),
        {
            "init_args": {"max_seq_length": 2048, "load_in_4bit": False},
            "peft_args": {"r": 8, "lora_alpha": 8, "random_state": 1},
            "trainer_args": {"optim": "adamw_8bit"},
        },
    )
    state = art.unsloth.train.create_unsloth_train_context(
        init_args=config["init_args"], peft_args=config["peft_args"], trainer_args=config["trainer_args"]
    )
    rng = random.Random(1)
    groups = []
    for story in generate_stories(40)[:8]:
        messages = list(policy_messages(story.scraped_body))
        groups.append([_title(rng, messages) for _ in range(6)])
    shared, alone = (pack(groups, folder, shared=together, length=2048) for together in (True, False))
    found = compare(state.peft_model, state.trainer.optimizer, shared, alone)
    (folder / "found.json").write_text(json.dumps(found))


def _title(rng: random.Random, messages: list[dict[str, str]]) -> Title:
    tokens = [*(rng.randrange(2000) for _ in range(rng.randrange(5, 40))), 2047]
    return Title(messages, tokens, [rng.uniform(-12.0, -2.0) for _ in tokens], rng.uniform(-1.0, 3.0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
