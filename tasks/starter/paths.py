"""Where the starter models lie, and what the word 'starter' in a profile stands for."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parent / "models"
BASE_MODEL = MODELS / "base"
REWARD_MODEL = MODELS / "reward-model"
HELDOUT_REWARD_MODEL = MODELS / "heldout-reward-model"


def resolve(name: str, starter: Path) -> str:
    """Return `name`, or the starter model's folder where `name` is 'starter'."""
    return str(starter) if name == "starter" else name
