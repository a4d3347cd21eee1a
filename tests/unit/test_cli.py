"""The command line as a user meets it: quick help, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "run", "train", "evaluate", "promote", "suggest", "check-data",
    "train-reward-model", "serve-reward-model", "check-reward-server",
    "up", "down", "status", "doctor",
)  # fmt: skip
HEAVY = ("torch", "transformers", "prefect", "mlflow", "art", "datasets", "uvicorn", "pandas")


def hn_titles(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # A terminal this wide keeps sentences on one line.
    variables = {**os.environ, "COLUMNS": "200", "HOME": str(cwd), **environment}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        env={**variables, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", [(), *[(name,) for name in COMMANDS]])
def test_help_imports_nothing_heavy(command: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom flows.cli import app\n"
        f"try:\n    app({[*command, '--help']!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"heavy = sorted(set(sys.modules) & set({HEAVY!r}))\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    if command:
        assert f"hn-titles {command[0]}" in result.stdout, "no example"
        if command[0] not in ("down", "status"):
            assert "--profile" in result.stdout and ("--set" in result.stdout or command[0] == "doctor")
    else:
        assert all(name in result.stdout for name in COMMANDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "--profile", "nope"), "No profile 'nope'. Expected one of"),
        (("run", "--set", "max_step=5"), "max_step: no such setting"),
        (("train", "--set", "max_steps=0"), "max_steps: Input should be greater than or equal to 1 (got 0)"),
        (("train", "--set", "max_steps"), "--set expects key=value, got 'max_steps'"),
        (("run", "--set", "temperature=0.7"), "biases the importance ratio"),
        (("run", "--run-name", "../x"), "A run name is a folder's name"),
        (("evaluate",), "There is no run in runs"),
        (("deploy",), "There is no Prefect server to talk to"),
        (("deploy", "--profile", "nope"), "No profile 'nope'. Expected one of"),
        (("doctor", "--profile", "nope"), "No profile 'nope'. Expected one of"),
        (("train", "--dry-run", "--set", "max_steps=0"), "max_steps: Input should be greater than or equal to 1"),
        (("evaluate", "--run-name", "x"), "There is no run 'x' in runs"),
        (("check-data", "--set", "stories=missing.parquet"), "missing.parquet"),
        (
            ("train-reward-model", "--set", "reward_training.epochs=0"),
            "reward_training.epochs: Input should be greater",
        ),
        (("train-reward-model", "--set", "reward_training.rank=8"), "reward_training.rank: no such setting"),
        (("serve-reward-model", "--heldout", "--set", "heldout_reward_model=null"), "has no heldout_reward_model"),
        (("run", "--no-such-flag"), "No such option"),
        (("fly",), "No such command 'fly'"),
    ],
)
def test_a_users_mistake_is_told_without_a_traceback(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    result = hn_titles(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "runs" / "starter-art-1").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = hn_titles("--debug", "run", "--profile", "nope", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr and "ConfigError" in result.stderr


def test_an_unreachable_tracking_server_ends_the_run_at_its_start(tmp_path: Path) -> None:
    result = hn_titles(
        "train",
        cwd=tmp_path,
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    assert result.returncode == 3, result.stderr
    assert "MLflow at http://127.0.0.1:9 could not start a run" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Log: runs/starter-art-1/run.log" in result.stderr
    assert "Traceback" in (tmp_path / "runs" / "starter-art-1" / "run.log").read_text()


def test_check_data_shows_counts_lengths_and_examples(tmp_path: Path) -> None:
    result = hn_titles("check-data", "--set", "train_stories=30", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "score below the minimum" in result.stdout and "Prompt lengths in tokens" in result.stdout
    assert result.stdout.count("human title: ") == 3
