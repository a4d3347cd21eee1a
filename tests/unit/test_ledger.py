"""What makes a step count: the order of what is written, and what a row says of the run so far."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from request_parts import request

from tasks.engines import ledger
from tasks.engines.checkpoints import complete_steps, write_checkpoint
from tasks.engines.contract import TrainingRequest
from tasks.engines.journal import Journal, first_collapse
from tasks.engines.ledger import Ledger, rollout_rows, validation_rows
from tasks.engines.resume import checkpoints_folder, journal_of, prepare_to_continue
from tasks.engines.training_state import TrainingState, first_state
from tasks.titles import metric_names as names
from tasks.titles.group_statistics import COLLAPSE_GROUPS, JUDGE_NOISE
from tasks.titles.rollout import Failure, Rollout, RolloutGroup


def open_ledger(asked: TrainingRequest) -> Ledger:
    """Do what an engine does at the start of a sitting."""
    return Ledger(asked, prepare_to_continue(asked) or first_state(asked, "mlflow-1"))


def next_state(state: TrainingState, asked: TrainingRequest) -> TrainingState:
    cursor = state.cursor.next_batch(asked.train, asked.profile.groups_per_step)[1].stepped()
    return replace(state, cursor=cursor)


def commit(
    book: Ledger, asked: TrainingRequest, *, train: float = 1.0, val: float | None = None, **written: Any
) -> None:
    """Write a checkpoint and commit it, as checkpoint 0 where there is none and as the next step otherwise."""
    fresh = not book.rows
    state = book.state if fresh else next_state(book.state, asked)
    with write_checkpoint(checkpoints_folder(asked.run_dir, "art"), state.cursor.step) as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    metrics = {} if fresh else {names.TRAIN_REWARD: train}
    if val is not None:
        metrics[names.VAL_REWARD_MEAN] = val
    book.commit(state, metrics, **written)


def group(*rewards: float, failures: int = 0) -> RolloutGroup:
    prompt = request(Path()).train[0]
    rollouts = [
        Rollout(
            story_id=prompt.story.id,
            title=f"Title {number}",
            messages=prompt.messages,
            choice=None,
            reward=reward,
            score=2.0,
            verdict=reward > 0,
            length=7,
            reward_model_version="1",
            seconds=1.0,
            written=0.0,
            tokens=3,
        )
        for number, reward in enumerate(rewards)
    ]
    lost = [Failure(prompt.story.id, "reward model: ServiceUnavailable", "down")] * failures
    return RolloutGroup(prompt, tuple(rollouts), tuple(lost))


# --- the order of what is written ------------------------------------------------------------------

WRITES = ["validation", "rollouts", "row", "mark"]
VALIDATED = {"val": 2.0, "titles": validation_rows([group(2.0)], 2), "groups": [group(2.0, 0.0)]}


class Death(BaseException):
    """The process ends here; nothing of this project's catches it."""


def die_at_write(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a death before the write of that number, and return the list in which the writes so far will stand."""
    done: list[str] = []

    def watched(owner: Any, attribute: str, name: Any) -> None:
        write = getattr(owner, attribute)

        def write_or_die(*arguments: Any) -> None:
            if len(done) == number:
                raise Death
            write(*arguments)
            done.append(name(*arguments))

        monkeypatch.setattr(owner, attribute, write_or_die)

    watched(ledger, "write_json", lambda path, _: path.parent.name)
    watched(Journal, "append", lambda *_: "row")
    watched(ledger, "commit_checkpoint", lambda *_: "mark")
    return done


@pytest.mark.parametrize("written", range(len(WRITES)))
def test_a_step_that_was_cut_short_is_done_again(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path)
    book = open_ledger(asked)
    commit(book, asked, val=1.0)
    commit(book, asked)
    with monkeypatch.context() as patch:
        done = die_at_write(written, patch)
        with pytest.raises(Death):
            commit(book, asked, train=9.0, **VALIDATED)
    assert done == WRITES[:written]

    again = open_ledger(asked)
    assert (again.state.cursor.step, again.state.best_step) == (1, 0)
    assert sorted(again.rows) == [0, 1]
    commit(again, asked, **VALIDATED)
    assert (again.state.cursor.step, again.state.best_step) == (2, 2)
    rows = journal_of(tmp_path).rows()
    assert sorted(rows) == [0, 1, 2]
    assert rows[2][names.TRAIN_REWARD] == 1.0
    assert json.loads((tmp_path / "validation" / "0002.json").read_text()) == VALIDATED["titles"]


def test_a_step_counts_once_its_mark_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path)
    book = open_ledger(asked)
    commit(book, asked, val=1.0)
    commit(book, asked)
    with monkeypatch.context() as patch:
        done = die_at_write(len(WRITES), patch)
        commit(book, asked, **VALIDATED)
    assert done == WRITES
    assert open_ledger(asked).state == book.state
    assert open_ledger(asked).rows == book.rows


def test_a_step_without_validation_writes_no_titles(tmp_path: Path) -> None:
    asked = request(tmp_path)
    book = open_ledger(asked)
    commit(book, asked)
    commit(book, asked, groups=[group(1.0, 2.0)])
    assert not (tmp_path / "validation").exists()
    assert not (tmp_path / "rollouts").exists()


# --- what a row says of the run --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("validated", "best"),
    [
        ([1.0, 1.0], 0),
        ([1.0, 1.0 + JUDGE_NOISE / 2], 0),
        ([1.0, 1.0 + 2 * JUDGE_NOISE], 1),
        # Each is within the noise of the one before, the last is not within that of the best.
        ([1.0, 1.0 + 0.6 * JUDGE_NOISE, 1.0 + 1.2 * JUDGE_NOISE], 2),
        ([1.0, 1.5, 1.2, 1.5 + JUDGE_NOISE / 2], 1),
        ([1.0, None, None, 1.5], 3),
        ([-2.0, -1.0], 1),
    ],
)
def test_the_best_step_is_better_by_more_than_the_judges_noise(
    validated: Sequence[float | None], best: int, tmp_path: Path
) -> None:
    asked = request(tmp_path)
    for val in validated:
        # Each step in a sitting of its own: what is the best so far is on disk.
        commit(open_ledger(asked), asked, val=val)
    state = open_ledger(asked).state
    assert (state.best_step, state.best_reward) == (best, validated[best])


@pytest.mark.parametrize("sittings", ["one", "many"])
def test_the_collapse_alarm_rings_from_the_first_collapsed_step_on(
    sittings: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The alarm compares windows of COLLAPSE_GROUPS groups: here of two steps.
    asked = request(tmp_path, groups_per_step=COLLAPSE_GROUPS // 2, learning_rate={"art": 0.25, "trl": 1e-3})
    book = open_ledger(asked)
    for reward in (0.0, 2.0, 2.0, 1.5, 0.4, 0.4, 0.4, 3.0):
        commit(book, asked, train=reward)
        if sittings == "many":
            book = open_ledger(asked)
    rows = journal_of(tmp_path).rows()
    # Row 0 has no training reward; steps 1 to 7 have 2, 2, 1.5, 0.4, 0.4, 0.4, 3.
    assert names.TRAIN_COLLAPSED not in rows[0]
    assert [step for step in rows if rows[step].get(names.TRAIN_COLLAPSED)] == [4, 5, 6]
    assert first_collapse(rows) == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert warnings[0].startswith("Step 4:") and "The learning rate (0.25)" in warnings[0]


def test_time_is_counted_over_all_sittings(tmp_path: Path) -> None:
    asked = request(tmp_path)
    book = open_ledger(asked)
    commit(book, asked)
    commit(book, asked)
    first = book.state.seconds
    again = Ledger(asked, replace(book.state, seconds=first + 1000))
    commit(again, asked)
    elapsed = [row[names.TIME_ELAPSED] for row in journal_of(tmp_path).rows().values()]
    assert 0 < elapsed[0] <= elapsed[1] == first
    assert elapsed[2] == again.state.seconds > first + 1000


@pytest.mark.parametrize(("eval_steps", "max_steps", "due"), [(3, 7, [0, 3, 6, 7]), (1, 2, [0, 1, 2]), (50, 4, [0, 4])])
def test_validation_is_due_first_regularly_and_last(
    eval_steps: int, max_steps: int, due: list[int], tmp_path: Path
) -> None:
    profile = request(tmp_path, eval_steps=eval_steps, max_steps=max_steps).profile
    assert [step for step in range(max_steps + 1) if profile.validates(step)] == due


def test_the_first_the_best_and_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    asked = request(tmp_path, keep_checkpoints=2)
    book = open_ledger(asked)
    for val in (1.0, None, 3.0, 2.0, None, None):
        commit(book, asked, val=val)
        kept = book.prune()
        assert kept == set(complete_steps(checkpoints_folder(tmp_path, "art")))
    assert kept == {0, 2, 4, 5}


def test_titles_as_rows() -> None:
    groups = [group(3.0, 0.0, 0.0, failures=1), group(2.0)]
    assert [(row["title"], row["reward"], row["advantage"]) for row in rollout_rows(groups, 4)] == [
        ("Title 0", 3.0, 2.0),
        ("Title 1", 0.0, -1.0),
        ("Title 2", 0.0, -1.0),
        ("Title 0", 2.0, 0.0),
    ]
    rows = validation_rows(groups, 4)
    assert [row["reward"] for row in rows] == [3.0, 0.0, 0.0, 2.0]
    assert {(row["step"], row["human_title"]) for row in rows} == {(4, groups[0].prompt.story.title)}
