"""Which runs a comparison takes, and whether they can be compared at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.titles.comparison import ENGINES
from tasks.titles.config import NEUTRAL_SETTINGS, Profile, override_profile
from tasks.titles.errors import ConfigError, DataError
from tasks.titles.run_directory import RunDirectory, find_run, newest_first, open_run

COMPARISONS = "comparisons"
"""Folder of comparisons in the runs directory."""

# What an engine may set for itself, and what does not change what is compared.
MAY_DIFFER = NEUTRAL_SETTINGS | {
    "name",
    "engine",
    "seed",
    "learning_rate",
    "loss",
    "updates_per_step",
    "packed_sequence_length",
    "art",
    "trl",
    "devices",
}


def plan(profile: Profile, seeds: Sequence[int], runs_dir: Path) -> list[tuple[Profile, RunDirectory | None]]:
    """Return the profile of every run that the comparison needs, and the trained run of these settings, if any.

    Raises `ConfigError` for no seeds, or one that comes twice.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"A comparison needs seeds, each one once, got {list(seeds)}.")
    known = newest_first(runs_dir)
    wanted = [override_profile(profile, [f"engine={engine}", f"seed={seed}"]) for seed in seeds for engine in ENGINES]
    return [(own, next((run for run in known if run.profile == own and run.trained), None)) for own in wanted]


def named_runs(names: Sequence[str], runs_dir: Path) -> list[RunDirectory]:
    """Return existing trained runs by name.

    Raises `DataError` for one that does not exist or is not trained, and `ConfigError` where their settings do not
    allow a comparison.
    """
    runs = [find_run(runs_dir, run_name=name) for name in names]
    for run in runs:
        if not run.trained:
            raise DataError(
                f"Run '{run.name}' is not trained to its end. Continue it with: hn-titles train --run-name {run.name}"
            )
    check_comparable([run.profile for run in runs])
    return runs


def check_comparable(profiles: Sequence[Profile]) -> None:
    """Raise `ConfigError` where runs differ in more than engine, seed and what an engine sets for itself."""
    first, *others = [profile.model_dump(mode="json") for profile in profiles]
    different = sorted({key for other in others for key in first.keys() - MAY_DIFFER if other[key] != first[key]})
    if different:
        values = [f"  {key}: {', '.join(str(own[key]) for own in [first, *others])}" for key in different]
        raise ConfigError(
            "These runs cannot be compared: they had other data, judges or budgets.\n" + "\n".join(values) + "\n"
            "Compare runs that differ in engine and seed only."
        )


def open_comparison(profile: Profile, runs_dir: Path, run_name: str | None = None) -> RunDirectory:
    """Return the folder `comparisons/<run_name>`, a new `<profile>-comparison-<n>` where no name is given.

    Its profile has the same engine and seed whatever runs are compared: the test titles are drawn by them.
    """
    profile = override_profile(profile, ["engine=art", "seed=1"])
    home = runs_dir / COMPARISONS
    number = 1
    while run_name is None:
        name = f"{profile.name}-comparison-{number}"
        run_name = name if not (home / name).exists() else None
        number += 1
    return open_run(profile, runs_dir=home, run_name=run_name)
