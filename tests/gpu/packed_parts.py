"""The policy as ART has Unsloth load it, and a step's titles packed and one by one: compared, in a process of its own.

python packed_parts.py FOLDER   writes FOLDER/figures.json, as `bench.gpu_proof.compare` returns them
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# ART's package imports Unsloth for this variable, which must come before everything that Unsloth rewrites.
os.environ["IMPORT_UNSLOTH"] = "1"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import art

# isort: split
from art.preprocessing.pack import PackedTensors
from openai.types.chat.chat_completion import Choice
from transformers import AutoTokenizer

from tasks.engines.art_backend import TitleBackend
from tasks.starter.paths import BASE_MODEL
from tasks.starter.world import generate_stories
from tasks.titles.prompts import policy_messages

GROUPS, TITLES, LENGTH = 4, 6, 2048
CONFIG = {
    "init_args": {"max_seq_length": LENGTH, "load_in_4bit": False},
    "peft_args": {"r": 8, "lora_alpha": 8},
    "trainer_args": {"optim": "adamw_8bit"},
}


def trajectory_groups() -> list[art.TrajectoryGroup]:
    """Return groups of titles, each title another story's, with log-probabilities as a sampler gives them."""
    tokenizer = AutoTokenizer.from_pretrained(str(BASE_MODEL))
    stories = generate_stories(GROUPS * TITLES)
    groups = []
    for number in range(GROUPS):
        messages = list(policy_messages(stories[number].scraped_body))
        titles = stories[number * TITLES : (number + 1) * TITLES]
        trajectories = [
            art.Trajectory(
                messages_and_choices=[*messages, _choice(tokenizer, story.title, place)],  # type: ignore[list-item]
                reward=float(place),
            )
            for place, story in enumerate(titles)
        ]
        groups.append(art.TrajectoryGroup(trajectories))
    return groups


def pack(folder: Path, *, shared: bool) -> PackedTensors:
    """Pack with ART's own code: with one copy of a group's prompt, or each trajectory in a sequence of its own."""
    backend = TitleBackend(path=str(folder), seed=1, in_process=True)
    backend._supports_result_packing = shared
    backend._packed_sequence_length_requires_chunk_alignment = not shared
    backend._image_processors[str(BASE_MODEL)] = None
    packed = backend._get_packed_tensors(
        art.TrainableModel(name="policy", project="tests", base_model=str(BASE_MODEL)),
        trajectory_groups(),
        advantage_balance=0.0,
        allow_training_without_logprobs=False,
        scale_rewards=True,
        plot_tensors=False,
        packed_sequence_length=LENGTH,
        logprob_calculation_chunk_size=1024,
    )
    assert packed is not None
    return packed


def _choice(tokenizer: Any, title: str, place: int) -> Choice:
    ids = [*tokenizer.encode(title, add_special_tokens=False), tokenizer.eos_token_id]
    content = [
        {"token": f"token_id:{one}", "logprob": -1.0 - place / 4, "bytes": None, "top_logprobs": []} for one in ids
    ]
    return Choice.model_validate(
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": title},
            "logprobs": {"content": content, "refusal": None},
        }
    )


def main(folder: Path) -> None:
    from art.unsloth.train import create_unsloth_train_context

    from bench.gpu_proof import compare
    from tasks.engines.gpu.backend import get_model_config

    config: Any = get_model_config(base_model=str(BASE_MODEL), output_dir=str(folder), config=CONFIG)  # type: ignore[arg-type]
    context = create_unsloth_train_context(
        init_args={**config["init_args"], "model_name": str(BASE_MODEL)},
        peft_args=config["peft_args"],
        trainer_args=config["trainer_args"],
    )
    trainer: Any = context.trainer
    figures = compare(trainer.model, trainer.optimizer, pack(folder, shared=True), pack(folder, shared=False))
    (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
