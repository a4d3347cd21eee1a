"""What the tests of TRL's side share: a real `GRPOTrainer` on the starter model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpu_parts import load_tokenizer
from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer

Message = dict[str, str]


def grpo_trainer(
    model: PeftModel,
    output_dir: Path,
    reward: Callable[..., list[float]],
    prompts: Sequence[Sequence[Message]],
    **options: Any,
) -> GRPOTrainer:
    """Return a trainer in float32 on a CPU that takes `prompts` in their order and logs each step."""
    arguments = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "shuffle_dataset": False,
        "lr_scheduler_type": "constant",
    }
    return GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=GRPOConfig(**{**arguments, **options}),
        train_dataset=Dataset.from_list([{"prompt": [dict(message) for message in prompt]} for prompt in prompts]),
        processing_class=load_tokenizer(),
    )
