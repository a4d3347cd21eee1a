"""Rebuilds the starter models from their seed, or reports on those that lie in the project.

python -m tasks.starter.build                 # all three: 7 minutes on an H100, days on two CPU cores
python -m tasks.starter.build --only reward   # both reward models on the base that is there
python -m tasks.starter.build --report        # figures of the models as they are
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.starter import paths, pretrain, train_reward
from tasks.starter.world import generate_stories

logger = logging.getLogger(__name__)

BASE_SEED = 1
REWARD_SEEDS = {paths.REWARD_MODEL.name: (0, 10), paths.HELDOUT_REWARD_MODEL.name: (1, 11)}
"""Which half of the train stories each reward model learns from, and its seed."""


def build_base(out: Path, *, device: str, steps: int, workers: int) -> None:
    """Train the tokenizer and the base model and write both to `out`/base, weights in bf16."""
    tokenizer = pretrain.new_tokenizer(BASE_SEED)
    model: Any = pretrain.train_base(tokenizer, seed=BASE_SEED, device=device, steps=steps, workers=workers)
    model.to(torch.bfloat16).save_pretrained(out / paths.BASE_MODEL.name)
    tokenizer.save_pretrained(out / paths.BASE_MODEL.name)


def build_reward_models(out: Path, *, device: str) -> None:
    """Train both reward models on `out`/base and write them beside it."""
    stories = generate_stories()
    for name, (half, seed) in REWARD_SEEDS.items():
        figures = train_reward.train_reward_model(
            out / paths.BASE_MODEL.name, stories, half=half, seed=seed, device=device, out=out / name
        )
        logger.info("%s: %s", name, {key: round(value, 3) for key, value in figures.items()})


def report(models: Path, *, device: str) -> dict[str, object]:
    """Return the figures of the base model on new tales and those of the reward models on the test split."""
    tokenizer = AutoTokenizer.from_pretrained(models / paths.BASE_MODEL.name)
    model: Any = AutoModelForCausalLM.from_pretrained(models / paths.BASE_MODEL.name, dtype=torch.float32)
    model.to(device).eval()
    accuracy = pretrain.verdict_accuracy(model, tokenizer, seed=99, batches=4)
    titles = pretrain.sampled_titles(model, tokenizer, seed=3, tales=256)
    return {
        "parameters": model.num_parameters(),
        "verdicts_right": accuracy,
        "sampled_titles_supported": sum(supported for _, _, supported in titles) / len(titles),
        **{name: json.loads((models / name / "figures.json").read_text()) for name in REWARD_SEEDS},
    }


def main() -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tasks.starter.build", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("base", "reward"), help="build just this part")
    parser.add_argument("--report", action="store_true", help="build nothing; print the figures as JSON")
    parser.add_argument("--out", type=Path, default=paths.MODELS, help="where the models lie (default: the project's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=pretrain.STEPS, help="training steps of the base model")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="makers of lessons")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not arguments.report:
        if arguments.only != "reward":
            build_base(arguments.out, device=arguments.device, steps=arguments.steps, workers=arguments.workers)
        if arguments.only != "base":
            build_reward_models(arguments.out, device=arguments.device)
    sys.stdout.write(json.dumps(report(arguments.out, device=arguments.device), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
