"""The journal of metrics: what a kill can do to it, and what it must not hide."""

from pathlib import Path

import pytest

from tasks.engines.journal import Journal
from tasks.titles.errors import CheckpointError


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    for step in range(4):
        journal.append(step, {"train/reward": step / 2, "val/reward/mean": 0.1})
    return journal


def test_rows_come_back(journal: Journal) -> None:
    assert journal.rows() == {step: {"train/reward": step / 2, "val/reward/mean": 0.1} for step in range(4)}


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    empty = Journal(tmp_path / "metrics.jsonl")
    assert empty.rows() == {}
    assert empty.cut_after(3) == {}
    assert not empty.path.exists()


@pytest.mark.parametrize("bytes_lost", range(1, 20, 3))
def test_a_row_cut_short_by_a_kill_does_not_count(journal: Journal, bytes_lost: int) -> None:
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-bytes_lost])
    assert sorted(journal.rows()) == [0, 1, 2]


def test_a_new_row_after_a_cut_one_is_readable(journal: Journal) -> None:
    journal.path.write_bytes(journal.path.read_bytes()[:-5])
    journal.cut_after(2)
    journal.append(3, {"train/reward": 9.0})
    assert journal.rows()[3] == {"train/reward": 9.0}
    assert sorted(journal.rows()) == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"metrics": {}}', '{"step": "x", "metrics": {}}'])
def test_a_damaged_row_in_the_middle_is_an_error(journal: Journal, line: str) -> None:
    lines = journal.path.read_text().splitlines()
    lines[1] = line
    journal.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match="line 2"):
        journal.rows()


def test_rows_after_the_last_complete_step_are_dropped(journal: Journal) -> None:
    assert sorted(journal.cut_after(1)) == [0, 1]
    assert sorted(journal.rows()) == [0, 1]
    assert journal.cut_after(-1) == {}
    assert journal.rows() == {}
    assert [path.name for path in journal.path.parent.iterdir()] == ["metrics.jsonl"]
