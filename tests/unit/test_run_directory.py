"""Which folder a command continues, and that no two processes share one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.titles.config import Profile, load_profile
from tasks.titles.errors import ConfigError, DataError
from tasks.titles.run_directory import find_run, open_run, run_to_continue, write_text

STARTER = load_profile("starter")


def other(**changes: object) -> Profile:
    return STARTER.model_copy(update=changes)


def test_a_new_run_has_its_profile_and_a_record(tmp_path: Path) -> None:
    run = open_run(STARTER, runs_dir=tmp_path)
    assert (run.name, run.resumed) == ("starter-art-1", False)
    assert Profile.model_validate_json((run.path / "profile.json").read_text()) == STARTER
    record = run.record()
    assert (record.name, record.state, record.mlflow_run_id) == ("starter-art-1", "training", None)
    run.update(mlflow_run_id="abc", state="trained")
    assert run.record().mlflow_run_id == "abc" and run.record().created == record.created


def test_the_newest_unfinished_run_of_the_very_same_profile_is_continued(tmp_path: Path) -> None:
    first = open_run(STARTER, runs_dir=tmp_path)
    different = open_run(other(max_steps=7), runs_dir=tmp_path)
    assert different.name == "starter-art-2"
    again = open_run(STARTER, runs_dir=tmp_path)
    assert (again.path, again.resumed) == (first.path, True)
    fresh = open_run(STARTER, runs_dir=tmp_path, fresh=True)
    assert fresh.name == "starter-art-3"
    assert open_run(STARTER, runs_dir=tmp_path).path == fresh.path


@pytest.mark.parametrize(
    ("state", "until", "continued"),
    [
        ("training", "trained", True),
        ("trained", "trained", False),
        ("trained", "evaluated", True),
        ("evaluated", "evaluated", False),
        ("evaluated", "trained", False),
    ],
)
def test_a_run_is_continued_until_it_is_as_far_as_the_command_goes(
    tmp_path: Path, state: str, until: str, continued: bool
) -> None:
    first = open_run(STARTER, runs_dir=tmp_path)
    first.update(state=state)
    assert (open_run(STARTER, runs_dir=tmp_path, until=until).path == first.path) is continued  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "continued"),
    [
        ({}, "second"),
        ({"until": "trained"}, "first"),
        ({"fresh": True}, None),
        ({"run_name": "first"}, "first"),
        ({"run_name": "new"}, None),
    ],
)
def test_what_would_be_continued_is_told_without_a_change(
    tmp_path: Path, options: dict[str, Any], continued: str | None
) -> None:
    for name in ("first", "second"):
        run = open_run(STARTER, runs_dir=tmp_path, run_name=name)
    run.update(state="trained")
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    found = run_to_continue(STARTER, runs_dir=tmp_path, **options)
    assert (found.name if found else None) == continued
    assert {path: path.stat() for path in tmp_path.rglob("*")} == before
    assert open_run(STARTER, runs_dir=tmp_path, **options).resumed is (continued is not None)


def test_a_named_run_with_other_settings_is_refused_with_their_names(tmp_path: Path) -> None:
    open_run(STARTER, runs_dir=tmp_path, run_name="mine")
    with pytest.raises(ConfigError, match=r"group_size: 6 there, 3 now"):
        open_run(other(group_size=3), runs_dir=tmp_path, run_name="mine")
    longer = open_run(other(max_steps=99), runs_dir=tmp_path, run_name="mine", may_change={"max_steps"})
    assert longer.resumed
    assert json.loads((longer.path / "profile.json").read_text())["max_steps"] == 99
    with pytest.raises(ConfigError, match="leave out --fresh"):
        open_run(STARTER, runs_dir=tmp_path, run_name="mine", fresh=True)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ConfigError, match=r"no run's folder: it holds cat.jpg"):
        open_run(STARTER, runs_dir=tmp_path, run_name="photos")
    # What a kill before the first run.json leaves is taken over.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "profile.json").touch()
    assert not open_run(STARTER, runs_dir=tmp_path, run_name="killed").resumed


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101])
def test_a_run_name_is_a_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="run name is a folder's name"):
        open_run(STARTER, runs_dir=tmp_path, run_name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_works_on_is_locked(tmp_path: Path) -> None:
    run = open_run(STARTER, runs_dir=tmp_path)
    code = (
        "import sys; from pathlib import Path; from tasks.titles.config import load_profile\n"
        "from tasks.titles.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1]), load_profile('starter'), True).locked():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}"), run.locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with run.locked():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_finding_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run in .*Runs there: none"):
        find_run(tmp_path)
    open_run(STARTER, runs_dir=tmp_path, run_name="a")
    open_run(other(name="mine"), runs_dir=tmp_path, run_name="b")
    assert find_run(tmp_path).name == "b"
    assert find_run(tmp_path, profile_name="starter").name == "a"
    assert find_run(tmp_path, run_name="a", profile_name="mine").name == "a"
    assert find_run(tmp_path, overrides=["test_stories=7"]).profile.test_stories == 7
    with pytest.raises(DataError, match=r"no run 'c' in .*Runs there: b, a"):
        find_run(tmp_path, run_name="c")
    (tmp_path / "b" / "profile.json").write_text('{"of": "another version"}')
    assert find_run(tmp_path).name == "a"


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "one")
    write_text(path, "half a surrogate \ud800")
    assert path.read_text() == "half a surrogate ?" and list(tmp_path.iterdir()) == [path]
