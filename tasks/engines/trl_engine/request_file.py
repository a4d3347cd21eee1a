"""What the flow has prepared, handed to the trainer's process in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tasks.engines.contract import TrainingRequest
from tasks.titles.config import parse_profile
from tasks.titles.errors import DataError
from tasks.titles.prompt_file import read_prompts, write_prompts

API_KEY = "REWARD_MODEL_API_KEY"
"""The variable of the trainer's environment that the reward model's key travels in; it never goes to disk."""


def write_request(request: TrainingRequest, folder: Path) -> Path:
    """Write `request` without its API key into `folder`, whole or not at all, and return the file.

    Raises `DataError` where the folder cannot be written to.
    """
    about = {
        "profile": request.profile.model_dump(mode="json"),
        "run_name": request.run_name,
        "run_dir": str(request.run_dir),
        "base_model": request.base_model,
        "reward_model_url": request.reward_model_url,
        "training_prompts": len(request.train),
    }
    path = folder / "request.parquet"
    write_prompts(path, [*request.train, *request.val], json.dumps(about))
    return path


def read_request(path: Path) -> TrainingRequest:
    """Return the request of a file, with the API key that the environment holds.

    Raises `DataError` where the file is missing, damaged or no request.
    """
    prompts, about = read_prompts(path)
    try:
        values = json.loads(about)
        training = values["training_prompts"]
        return TrainingRequest(
            profile=parse_profile(values["profile"], source=str(path)),
            run_name=values["run_name"],
            run_dir=Path(values["run_dir"]),
            base_model=values["base_model"],
            train=prompts[:training],
            val=prompts[training:],
            reward_model_url=values["reward_model_url"],
            reward_model_api_key=os.environ.get(API_KEY) or None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a training request: {type(error).__name__}: {error}") from error
