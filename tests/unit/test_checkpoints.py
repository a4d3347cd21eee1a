"""Checkpoint folders: whole or not at all, complete only with their cursor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tasks.engines.checkpoints import (
    commit_checkpoint,
    complete_steps,
    discard_incomplete,
    latest_complete,
    prune,
    read_cursor,
    step_folder,
    steps_on_disk,
    write_checkpoint,
)
from tasks.titles.errors import CheckpointError


def write(checkpoints: Path, step: int, *, complete: bool = True) -> Path:
    with write_checkpoint(checkpoints, step) as folder:
        (folder / "adapter.txt").write_text(f"weights of {step}")
    if complete:
        commit_checkpoint(step_folder(checkpoints, step), {"step": step, "index": step * 8})
    return step_folder(checkpoints, step)


def test_a_checkpoint_is_complete_once_its_cursor_is_there(tmp_path: Path) -> None:
    assert complete_steps(tmp_path) == []
    assert latest_complete(tmp_path) is None
    write(tmp_path, 0)
    folder = write(tmp_path, 12, complete=False)
    assert folder.name == "0012"
    assert steps_on_disk(tmp_path) == [0, 12]
    assert latest_complete(tmp_path) == 0
    commit_checkpoint(folder, {"step": 12, "seed": 3})
    assert latest_complete(tmp_path) == 12
    assert read_cursor(folder) == {"step": 12, "seed": 3}
    assert (folder / "adapter.txt").read_text() == "weights of 12"


def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disk full"), write_checkpoint(tmp_path, 1) as folder:
        (folder / "adapter.txt").write_text("half")
        raise ValueError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_written_twice(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists already"), write_checkpoint(tmp_path, 1):
        pass
    assert (step_folder(tmp_path, 1) / "adapter.txt").read_text() == "weights of 1"


def test_a_cursor_of_another_step_is_refused_and_does_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, complete=False)
    with pytest.raises(CheckpointError, match="step 2"):
        commit_checkpoint(folder, {"step": 2})
    # What ART does for a batch without spread: the folder is copied whole, with its cursor.
    (folder / "cursor.json").write_text(json.dumps({"step": 2}))
    assert complete_steps(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"step": "3"}', "{}"])
def test_a_cursor_that_cannot_be_read_does_not_count(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path, 3, complete=False)
    (folder / "cursor.json").write_text(content)
    assert complete_steps(tmp_path) == []
    with pytest.raises(CheckpointError):
        read_cursor(folder)


def test_a_cursor_needs_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        commit_checkpoint(step_folder(tmp_path, 4), {"step": 4})


def test_incomplete_checkpoints_and_leftovers_are_discarded(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1)
    write(tmp_path, 2, complete=False)
    (tmp_path / ".new-0003-abcd").mkdir()
    (tmp_path / "notes").mkdir()
    assert discard_incomplete(tmp_path) == [2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0000", "0001", "notes"]


def test_an_untrained_checkpoint_alone_is_no_reason_to_refuse(tmp_path: Path) -> None:
    write(tmp_path, 0, complete=False)
    assert discard_incomplete(tmp_path) == [0]
    assert discard_incomplete(tmp_path / "not-there-yet") == []


def test_trained_checkpoints_without_any_cursor_are_refused_and_kept(tmp_path: Path) -> None:
    write(tmp_path, 0, complete=False)
    write(tmp_path, 7, complete=False)
    with pytest.raises(CheckpointError, match=r"none has a cursor\.json"):
        discard_incomplete(tmp_path)
    assert steps_on_disk(tmp_path) == [0, 7]


def test_prune_keeps_what_it_is_told(tmp_path: Path) -> None:
    for step in range(5):
        write(tmp_path, step)
    assert prune(tmp_path, {0, 3, 4}) == [1, 2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0000", "0003", "0004"]


def test_a_kill_while_writing_leaves_no_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from tasks.engines.checkpoints import write_checkpoint
        with write_checkpoint(Path(sys.argv[1]), 1) as folder:
            (folder / "adapter.txt").write_text("half of the weights")
            sys.stdout.write("writing\\n")
            sys.stdout.flush()
            time.sleep(60)
        """
    )
    write(tmp_path, 0)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(tmp_path.iterdir())) == 2, "the temporary folder should still lie there"
    assert steps_on_disk(tmp_path) == [0]
    assert discard_incomplete(tmp_path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["0000"]
