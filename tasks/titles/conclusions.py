"""What a comparison says, in sentences: which differences are real, which are not, and what to keep in mind."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.titles.comparison import ENGINES, Comparison, Difference, Method
from tasks.titles.config import EngineName
from tasks.titles.evaluation import BASE, BEST_OF, BEST_OF_N, FIRST_SENTENCE, HUMAN
from tasks.titles.summary import FEWEST_STORIES

FEWEST_SEEDS = 5
"""Seeds below which the conclusions call the intervals rough: so few say little of the next one."""

_PER_TITLE = "averaged over each title's tokens and then over titles, so that every title counts the same"
_PER_TOKEN = "averaged over all tokens of a step, so that a long title counts more than a short one"
_CLIPPED = "each token's probability ratio, clipped to between 0.8 and 1.2, times the advantage"
_REINFORCE = "each token's log-probability times the advantage and its probability ratio, a constant cut off at 5"
FORMULAS: Mapping[tuple[EngineName, str], str] = {
    ("art", "cispo"): f"CISPO: {_REINFORCE}; {_PER_TITLE}.",
    ("art", "ppo"): f"PPO: {_CLIPPED}; {_PER_TITLE}.",
    ("trl", "dapo"): f"DAPO: {_CLIPPED}; {_PER_TOKEN}.",
    ("trl", "grpo"): f"GRPO: {_CLIPPED}; {_PER_TITLE}.",
    ("trl", "cispo"): f"CISPO: {_REINFORCE}; {_PER_TOKEN}.",
}
"""By engine and the framework's name of its loss: `art.loss.loss_fn`, which ART gives weights of 1 / the title's length
for its tokens, and `GRPOTrainer._compute_loss`."""

_SAID = {
    "reward": ("earn", "more reward a title", "less reward a title"),
    "score": ("score", "higher with the reward model", "lower with the reward model"),
    "heldout_score": ("score", "higher with the held-out reward model", "lower with the held-out reward model"),
    "matches": (
        "get",
        "percentage points more titles past the validator",
        "percentage points fewer titles past the validator",
    ),
}
"""By measure: what a method does, and how much of it, where it does more and where less."""


def loss_of(comparison: Comparison, engine: EngineName) -> str:
    """Return the framework's name of the loss that an engine's runs used."""
    return getattr(comparison.runs_of(engine)[0].profile.loss, engine)


def same_loss(comparison: Comparison) -> bool:
    """Return whether both engines used one formula.

    A KL penalty makes two of any: ART moves the advantages by it, TRL adds it to the loss.
    """
    losses = tuple(loss_of(comparison, engine) for engine in ENGINES)
    return losses == ("ppo", "grpo") and all(run.profile.kl_beta == 0 for run in comparison.runs)


def sentence(found: Difference, seeds: int) -> str:
    """Return a difference as one sentence with its verdict; `seeds` is how many checkpoints "best" stands for."""
    verb, more, less = _SAID[found.measure]
    interval, rises = found.difference, found.difference.mean >= 0
    ends = (interval.low, interval.high) if rises else (-interval.high, -interval.low)
    factor, digits = (100, 1) if found.measure == "matches" else (1, 2)
    mean, low, high = (f"{factor * value:z.{digits}f}" for value in (abs(interval.mean), *ends))
    (subject, plural), (reference, _) = _noun(found.after, seeds), _noun(found.before, seeds)
    return (
        f"{subject[0].upper()}{subject[1:]} {verb}{'' if plural else 's'} {mean} [{low}, {high}] "
        f"{more if rises else less} than {reference}: {'a real difference' if found.real else 'too close to tell'}."
    )


def conclusions(comparison: Comparison) -> list[str]:
    """Return what the comparison found, and what a reader has to keep in mind."""
    asked = [
        *((f"{engine}_best", BASE) for engine in ENGINES),
        (f"{ENGINES[1]}_best", f"{ENGINES[0]}_best"),
        *((f"{engine}_best", BEST_OF_N) for engine in ENGINES),
    ]
    found = [comparison.difference(*pair) for pair in asked]
    sentences = [sentence(each, len(comparison.seeds)) for each in found if each is not None]
    return [*sentences, *_training(comparison), *_losses(comparison), *_certainty(comparison)]


def _noun(method: Method, seeds: int) -> tuple[str, bool]:
    """Return how a method is called in a sentence, and whether that is a plural."""
    if method.engine:
        return f"{method.engine.upper()}'s {method.checkpoint} checkpoint{'s' if seeds > 1 else ''}", seeds > 1
    return {
        BASE: ("the base model", False),
        BEST_OF_N: (f"the best of {BEST_OF} base-model titles", False),
        HUMAN: ("human titles", True),
        FIRST_SENTENCE: ("the story's first sentence", False),
    }[method.id]


def _losses(comparison: Comparison) -> list[str]:
    art, trl = (loss_of(comparison, engine) for engine in ENGINES)
    used = f"ART's loss was '{art}', TRL's '{trl}'"
    if same_loss(comparison):
        sentences = [f"{used}: on titles of the present policy one formula."]
    else:
        sentences = [
            f"{used}: different formulas, so a difference between the engines may be one of the losses. "
            "loss.art=ppo, loss.trl=grpo and kl_beta=0 make them equal."
        ]
    sentences.append(
        "Both divide a group's advantages by the spread of its rewards; ART then scales those of a step to a mean size "
        "of 1, so that one gradient clip need not mean the same to both."
    )
    profile = comparison.runs_of("art")[0].profile
    if profile.updates_per_step == "per_sequence":
        sentences.append(
            "ART makes one optimiser update for each packed sequence (updates_per_step = per_sequence), up to "
            f"{profile.groups_per_step * profile.group_size} a step; TRL makes one a step."
        )
    return sentences


def _training(comparison: Comparison) -> list[str]:
    """Return what went wrong in the runs, and what they do not share."""
    sentences = [
        f"Run {run.run_name} ({run.engine.upper()}, seed {run.seed}) collapsed at step {run.training.collapsed_at}: "
        "its last checkpoint is that of a broken policy."
        for run in comparison.runs
        if run.training.collapsed_at is not None
    ]
    counts = {
        engine: [(run.training.trajectories_dropped, run.trajectories) for run in comparison.runs_of(engine)]
        for engine in ENGINES
    }
    if any(dropped for own in counts.values() for dropped, _ in own):
        words = (
            f"{engine.upper()} {sum(dropped for dropped, _ in own)} beside {sum(kept for _, kept in own):,} kept"
            for engine, own in counts.items()
        )
        sentences.append(f"Trajectories dropped in training, because a judge or the policy failed: {', '.join(words)}.")
    settings = _different_settings(comparison)
    if settings:
        sentences.append(f"The runs differ in more than engine and seed: {', '.join(settings)}.")
    failed = sum(title.failure is not None for title in comparison.titles)
    if failed:
        sentences.append(
            f"{failed} of {len(comparison.titles):,} test titles could not be judged; no figure counts them."
        )
    return sentences


def _different_settings(comparison: Comparison) -> list[str]:
    """Return the settings that not all runs share, in words."""
    own = {"name", "engine", "seed"}
    profiles = [run.profile.model_dump(mode="json", exclude=own) for run in comparison.runs]
    values = {name: list(dict.fromkeys(str(profile[name]) for profile in profiles)) for name in profiles[0]}
    return [f"{name} ({' and '.join(each)})" for name, each in values.items() if len(each) > 1]


def _certainty(comparison: Comparison) -> list[str]:
    """Return what makes the intervals less than they seem."""
    seeds, stories = len(comparison.seeds), len(comparison.prompts)
    sentences = []
    if seeds == 1:
        sentences.append("With one seed the intervals know of the stories alone: another seed may turn the result.")
    elif seeds < FEWEST_SEEDS:
        sentences.append(
            f"The intervals are over stories and {seeds} seeds; with fewer than {FEWEST_SEEDS} seeds they are wide and "
            "rough."
        )
    if stories < FEWEST_STORIES:
        sentences.append(f"With {stories} test {'story' if stories == 1 else 'stories'} the intervals say little.")
    heldout = comparison.figures[BASE, "sampled"].measures["heldout_score"]
    if heldout is None:
        sentences.append("No held-out reward model judged: titles that please the trained-on one alone go unnoticed.")
    return sentences
