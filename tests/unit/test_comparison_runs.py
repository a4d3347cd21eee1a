"""Which runs a comparison takes, and which it refuses to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.titles.comparison_runs import MAY_DIFFER, check_comparable, named_runs, open_comparison, plan
from tasks.titles.config import Profile, load_profile
from tasks.titles.errors import ConfigError, DataError
from tasks.titles.run_directory import RunDirectory, open_run


def starter(*overrides: str) -> Profile:
    return load_profile("starter", overrides)


def run(runs_dir: Path, *overrides: str, name: str | None = None, state: str = "trained") -> RunDirectory:
    made = open_run(starter(*overrides), runs_dir=runs_dir, run_name=name, fresh=True)
    made.update(state=state)
    return made


def test_every_engine_is_planned_with_every_seed(tmp_path: Path) -> None:
    planned = plan(starter("max_steps=5"), [7, 8], tmp_path)
    assert [(own.engine, own.seed, own.max_steps, found) for own, found in planned] == [
        ("art", 7, 5, None),
        ("trl", 7, 5, None),
        ("art", 8, 5, None),
        ("trl", 8, 5, None),
    ]


def test_a_trained_run_of_the_same_settings_is_used_again(tmp_path: Path) -> None:
    same = run(tmp_path, "engine=trl", "seed=7")
    run(tmp_path, "engine=art", "seed=7", state="training")
    run(tmp_path, "engine=art", "seed=7", "max_steps=5")
    found = {own.engine: known and known.name for own, known in plan(starter(), [7], tmp_path)}
    assert found == {"art": None, "trl": same.name}


@pytest.mark.parametrize("seeds", [[], [1, 2, 1]])
def test_no_seeds_and_seeds_that_come_twice_are_refused(tmp_path: Path, seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="each one once"):
        plan(starter(), seeds, tmp_path)


def test_runs_are_taken_by_name(tmp_path: Path) -> None:
    names = [run(tmp_path, f"engine={engine}", "seed=4", name=f"my-{engine}").name for engine in ("art", "trl")]
    assert [(one.name, one.profile.engine) for one in named_runs(names, tmp_path)] == [
        ("my-art", "art"),
        ("my-trl", "trl"),
    ]


def test_an_unfinished_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run(tmp_path, name="half", state="training")
    with pytest.raises(DataError, match="hn-titles train --run-name half"):
        named_runs(["half"], tmp_path)


@pytest.mark.parametrize(
    ("setting", "other"),
    [("stories", "other.parquet"), ("max_steps", 5), ("reward_model", "other"), ("group_size", 4), ("kl_beta", 0.5)],
)
def test_runs_with_other_data_judges_or_budgets_are_refused(setting: str, other: Any) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: .*{other}"):
        check_comparable([starter("engine=art"), starter("engine=trl", f"{setting}={other}")])


def test_what_an_engine_sets_for_itself_may_differ() -> None:
    check_comparable([starter("engine=art", "seed=1"), starter("engine=trl", "seed=2", "learning_rate.trl=1e-3")])
    assert set(Profile.model_fields) >= MAY_DIFFER


def test_comparisons_have_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (open_comparison(starter(), tmp_path) for _ in range(2))
    assert [home.path.relative_to(tmp_path).as_posix() for home in (first, second)] == [
        "comparisons/starter-comparison-1",
        "comparisons/starter-comparison-2",
    ]
    assert open_comparison(starter("engine=trl", "seed=7"), tmp_path, first.name).path == first.path
    assert (first.profile.engine, first.profile.seed) == ("art", 1)
