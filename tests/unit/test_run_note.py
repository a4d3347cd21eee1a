"""The description of a run in MLflow: what it is, where its files are, what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.titles.config import load_profile
from tasks.titles.run_directory import RunDirectory
from tasks.titles.run_note import Kind, run_note, trained_sentence


def note(kind: Kind, *overrides: str, results: tuple[str, ...] = ()) -> str:
    profile = load_profile("starter", overrides)
    return run_note(RunDirectory(Path("runs/mine"), profile, resumed=False), kind, results)


@pytest.mark.parametrize(
    ("kind", "overrides", "told", "untold"),
    [
        ("training", ["engine=art"], "ART trains a policy: 60 steps of 8 stories with 6 titles each, seed 1.", "TRL"),
        ("training", ["engine=trl", "seed=2"], "TRL trains a policy: 60 steps of 8 stories with 6 titles each, se", ""),
        ("training", ["engine=trl"], "| learning rate | 0.003 |", "0.002"),
        ("training", ["heldout_reward_model=null"], "| held-out reward model | none |", ""),
        ("comparison", [], "before the same judges", "learning rate"),
        ("reward model", ["reward_training.base_model=a/b"], "| base model | a/b |", "LoRA"),
        ("training", ["stories=a|b.jsonl"], r"| stories | a\|b.jsonl, 20 upvotes or more |", ""),
    ],
)
def test_a_note_says_what_a_run_is(kind: Kind, overrides: list[str], told: str, untold: str) -> None:
    found = note(kind, *overrides)
    assert told in found
    assert not untold or untold not in found
    assert f"| files | `{Path('runs/mine').resolve()}` |" in found and "| profile | starter |" in found


def test_what_came_of_a_run_stands_before_its_settings() -> None:
    parts = note("training", results=("It is better.", "", "| a |\n| --- |")).split("\n\n")
    assert parts[1:3] == ["It is better.", "| a |\n| --- |"] and parts[3].startswith("| setting | value |")
    assert len(parts) == 4


@pytest.mark.parametrize(
    ("best", "validation", "told"),
    [
        (60, [(0, 2.0), (30, 3.0), (60, 3.25)], "step 60: its validation titles earn 3.25, step 0 2.00."),
        (0, [(0, 2.0), (60, 1.0)], "step 0: its validation titles earn 2.00."),
        (60, [], "the best checkpoint is that of step 60."),
    ],
)
def test_what_a_training_came_to(best: int, validation: list[tuple[int, float]], told: str) -> None:
    assert trained_sentence(60, best, validation).startswith("Trained 60 steps")
    assert trained_sentence(60, best, validation).endswith(told)
