"""What MLflow shows at the head of a run's page: what the run is, where its files are, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tasks.titles.config import Profile
from tasks.titles.run_directory import RunDirectory
from tasks.titles.summary import markdown_table

Kind = Literal["training", "comparison", "reward model"]
"""What a run in MLflow is of; stored as its tag `kind`."""


def run_note(run: RunDirectory, kind: Kind, results: Sequence[str] = ()) -> str:
    """Return the description of a run as Markdown; `results` are paragraphs on what came of it."""
    facts = {"profile": run.profile.name, **_facts(run.profile, kind), "files": f"`{run.path.resolve()}`"}
    rows = [{"setting": name, "value": value} for name, value in facts.items()]
    return "\n\n".join([_headline(run.profile, kind), *(part for part in results if part), markdown_table(rows)])


def trained_sentence(steps: int, best_step: int, validation: Sequence[tuple[int, float]]) -> str:
    """Return what a training came to; `validation` holds (step, mean validation reward) pairs."""
    by_step = dict(validation)
    trained = f"Trained {steps} steps; the best checkpoint is that of step {best_step}"
    if best_step not in by_step:
        return f"{trained}."
    before = f", step 0 {by_step[0]:.2f}" if best_step and 0 in by_step else ""
    return f"{trained}: its validation titles earn {by_step[best_step]:.2f}{before}."


def _headline(profile: Profile, kind: Kind) -> str:
    if kind == "comparison":
        return "ART and TRL before the same judges: the runs below this one."
    if kind == "reward model":
        return "A reward model learns log upvotes of titles."
    size = f"{profile.groups_per_step} stories with {profile.group_size} titles each"
    return f"{profile.engine.upper()} trains a policy: {profile.max_steps} steps of {size}, seed {profile.seed}."


def _facts(profile: Profile, kind: Kind) -> dict[str, str]:
    if kind == "reward model":
        training = profile.reward_training
        return {
            "base model": training.base_model,
            "stories": profile.stories,
            "learning rate": f"{training.learning_rate:g}",
            "device": profile.device,
        }
    facts = {
        "base model": profile.base_model,
        "stories": f"{profile.stories}, {profile.minimum_score} upvotes or more",
        "reward model": profile.reward_model,
        "held-out reward model": profile.heldout_reward_model or "none",
    }
    if kind == "training":
        facts |= {
            "learning rate": f"{getattr(profile.learning_rate, profile.engine):g}",
            "LoRA": f"rank {profile.lora_rank}, alpha {profile.lora_alpha}",
        }
    return facts | {"device": profile.device}
