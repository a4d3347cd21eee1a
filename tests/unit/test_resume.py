"""What may be continued, from where, and what is refused and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from request_parts import prompts, request

from tasks.engines.checkpoints import commit_checkpoint
from tasks.engines.contract import TrainingRequest
from tasks.engines.resume import checkpoints_folder, journal_of, prepare_to_continue, stored_state
from tasks.engines.training_state import MAY_CHANGE, TrainingState, first_state
from tasks.titles.config import Profile
from tasks.titles.errors import CheckpointError


def write_run(asked: TrainingRequest, *, complete: list[int], incomplete: list[int] = ()) -> TrainingState:
    """Leave on disk what a training of these steps leaves; return the last complete step's state."""
    state = first_state(asked, "mlflow-1")
    cursor = state.cursor
    for step in range(max([*complete, *incomplete]) + 1):
        folder = checkpoints_folder(asked.run_dir, "art") / f"{step:04d}"
        if step in complete or step in incomplete:
            folder.mkdir(parents=True)
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
        journal_of(asked.run_dir).append(step, {"train/reward": float(step)})
        if step in complete:
            state = replace(state, cursor=cursor, best_reward=0.5)
            commit_checkpoint(folder, state.to_json())
        cursor = cursor.next_batch(asked.train, asked.profile.groups_per_step)[1].stepped()
    return state


def test_a_fresh_run_has_no_state(tmp_path: Path) -> None:
    assert stored_state(tmp_path, "art") is None
    assert prepare_to_continue(request(tmp_path)) is None


def test_a_state_survives_json(tmp_path: Path) -> None:
    asked = request(tmp_path)
    state = replace(first_state(asked, "m"), best_reward=1.5, best_step=4, seconds=9.25, trajectories_dropped=3)
    assert TrainingState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_the_last_complete_checkpoint_is_continued(tmp_path: Path) -> None:
    asked = request(tmp_path)
    state = write_run(asked, complete=[0, 3, 4, 5])
    assert prepare_to_continue(asked) == state == stored_state(tmp_path, "art")
    assert state.cursor.step == 5
    assert state.mlflow_run_id == "mlflow-1"


def test_what_a_kill_leaves_of_the_next_step_is_dropped(tmp_path: Path) -> None:
    asked = request(tmp_path)
    write_run(asked, complete=[0, 3, 4], incomplete=[5])
    half_written = checkpoints_folder(tmp_path, "art") / ".new-0006-x"
    half_written.mkdir()
    state = prepare_to_continue(asked)
    assert state is not None
    assert state.cursor.step == 4
    assert sorted(path.name for path in checkpoints_folder(tmp_path, "art").iterdir()) == ["0000", "0003", "0004"]
    assert sorted(journal_of(tmp_path).rows()) == [0, 1, 2, 3, 4]


def test_a_kill_before_the_first_commit_starts_over(tmp_path: Path) -> None:
    asked = request(tmp_path)
    write_run(asked, complete=[], incomplete=[0])
    assert prepare_to_continue(asked) is None
    assert not list(checkpoints_folder(tmp_path, "art").iterdir())
    assert journal_of(tmp_path).rows() == {}


@pytest.mark.parametrize(
    ("complete", "incomplete", "named"),
    [([0, 2, 3], [4, 5], "5"), ([0, 3, 4], [2], "2"), ([], [1, 2], "1, 2"), ([], [0, 7], "7")],
)
def test_a_checkpoint_without_its_cursor_is_refused(
    tmp_path: Path, complete: list[int], incomplete: list[int], named: str
) -> None:
    asked = request(tmp_path)
    write_run(asked, complete=complete, incomplete=incomplete)
    before = sorted(checkpoints_folder(tmp_path, "art").iterdir())
    with pytest.raises(CheckpointError, match=rf"Checkpoint {named} .* has no cursor"):
        prepare_to_continue(asked)
    assert sorted(checkpoints_folder(tmp_path, "art").iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 2}, "seed was 1 and is 2"),
        ({"learning_rate": {"art": 2e-3, "trl": 1e-3}}, "learning_rate was"),
        ({"groups_per_step": 3}, "groups_per_step was 2 and is 3"),
        ({"lora_rank": 4}, "lora_rank was 8 and is 4"),
        ({"name": "other"}, "name was 'tests' and is 'other'"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    write_run(request(tmp_path), complete=[0, 1])
    with pytest.raises(CheckpointError, match=told):
        prepare_to_continue(request(tmp_path, **changes))


def test_other_stories_are_refused(tmp_path: Path) -> None:
    asked = request(tmp_path)
    write_run(asked, complete=[0, 1])
    others = [
        replace(asked, train=prompts("a", "b", "c", "d", "x")),
        replace(asked, train=prompts("b", "a", "c", "d", "e")),
        replace(asked, train=prompts("a", "b", "c", "d", "e", "v"), val=prompts("w")),
        replace(asked, val=prompts("v")),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="stories are others"):
            prepare_to_continue(other)


def test_another_runs_checkpoints_are_refused(tmp_path: Path) -> None:
    asked = request(tmp_path)
    write_run(asked, complete=[0, 1])
    with pytest.raises(CheckpointError, match="is of run 'first', this is run 'second'"):
        prepare_to_continue(replace(asked, run_name="second"))


def test_a_longer_run_is_a_continuation(tmp_path: Path) -> None:
    write_run(request(tmp_path), complete=[0, 1])
    state = prepare_to_continue(request(tmp_path, max_steps=99, rollout_concurrency=7, prefect_rollouts=False))
    assert state is not None
    assert state.cursor.step == 1


def test_what_may_change_are_settings() -> None:
    assert set(Profile.model_fields) >= MAY_CHANGE


@pytest.mark.parametrize("key", ["fingerprint", "mlflow_run_id", "profile", "best_step", "seconds"])
def test_a_cursor_file_with_a_part_missing_is_refused(tmp_path: Path, key: str) -> None:
    asked = request(tmp_path)
    write_run(asked, complete=[0, 1])
    path = checkpoints_folder(tmp_path, "art") / "0001" / "cursor.json"
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=key):
        prepare_to_continue(asked)
