"""The folders of reward model trainings, beside those of policies."""

from __future__ import annotations

from pathlib import Path

from tasks.titles.config import Profile
from tasks.titles.run_directory import RunDirectory, open_run

REWARD_MODELS = "reward-models"
"""Folder of these runs in the runs directory."""
# The profile's other settings belong to policies.
_DECIDES = {"name", "stories", "seed", "device", "reward_training"}


def open_reward_run(
    profile: Profile, runs_dir: Path, *, run_name: str | None = None, fresh: bool = False
) -> RunDirectory:
    """Return the folder to train a reward model in, by the rules of `open_run`."""
    return open_run(
        profile,
        runs_dir=runs_dir / REWARD_MODELS,
        run_name=run_name,
        fresh=fresh,
        until="trained",
        may_change=Profile.model_fields.keys() - _DECIDES,
        stem=f"{profile.name}-reward-model",
    )


def model_folder(run: RunDirectory) -> Path:
    """Return where a run's finished model lies."""
    return run.path / "model"
