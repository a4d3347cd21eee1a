"""`hn-titles doctor` and `hn-titles train --dry-run` as a user gives them: real answers, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.titles.config import load_profile
from tasks.titles.run_directory import open_run

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--set", "train_stories=20", "--set", "val_stories=5", "--set", "max_steps=12", "--set", "groups_per_step=2")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "REWARD_MODEL_URL", "RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    # Refuses at once, whatever network there is.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent / "no cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hn_titles(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})


def test_doctor_looks_at_the_real_machine(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        monkeypatch.setenv("HN_TITLES_PORT_MLFLOW", str(number))
        answered = hn_titles("doctor", "--json")
    assert answered.returncode == 0, answered.stderr
    report = json.loads(answered.stdout)
    assert report["profiles"]["starter"] == {"can_run": True, "engines": {"art": [], "trl": []}}
    assert set(report["profiles"]) == {"starter", "starter-gpu", "qwen-0.5b", "qwen-7b"}
    machine = report["machine"]
    assert machine["cores"] == len(os.sched_getaffinity(0)) and machine["memory_bytes"] > 10**9
    ports = {port["service"]: port for port in machine["ports"]}
    assert ports["mlflow"]["number"] == number and f"process {os.getpid()}" in ports["mlflow"]["held_by"]
    assert {one["service"]: one["state"] for one in machine["answers"]}["prefect"] == "not started"
    (cpu,) = (one for one in machine["environments"] if one["extra"] == "cpu")
    assert {one["name"]: one["found"] for one in cpu["packages"]}["transformers"] == "5.2.0"
    # The stories of a profile for the hub are nowhere here.
    reasons = " ".join(report["profiles"]["qwen-0.5b"]["engines"]["art"])
    assert "--set stories=FILE" in reasons and "there is no reward model models/reward-model" in reasons
    assert list(workplace.iterdir()) == []


def test_doctor_says_what_to_do_in_80_columns_and_answers_for_one_profile(workplace: Path) -> None:
    answered = hn_titles("doctor", "--profile", "qwen-7b")
    assert answered.returncode == 2 and "Traceback" not in answered.stderr
    lines = answered.stdout.splitlines()
    assert "qwen-7b: cannot run" in lines and "starter" not in answered.stdout
    assert max(map(len, lines)) <= 80
    assert any("HF_ENDPOINT" in line for line in lines)


def test_a_dry_run_tells_work_memory_and_time_and_starts_nothing(workplace: Path) -> None:
    before = open_run(load_profile("starter", ["max_steps=30", "groups_per_step=2"]), runs_dir=Path("runs"))
    rows = [{"step": step, "metrics": {"time/step_s": 2.0, "time/eval_s": 1.0}} for step in range(1, 4)]
    (before.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left = sorted(workplace.rglob("*"))
    answered = hn_titles("train", "--dry-run", *SMALL)
    assert answered.returncode == 0, answered.stdout + answered.stderr
    said = " ".join(answered.stdout.split())
    assert "steps 12 of 2 x 6 titles, 1.2 times through the prompts" in said
    # Before the first step, after 10 and after 12.
    assert "titles 144 to train on, 15 in 3 validations" in said
    assert "context 940 of the 2,048 tokens" in said
    # 12 steps of 2 s and 3 validations of 1 s.
    assert "time about 27 s of steps and validations: 2 s a step in starter-art-1" in said
    assert said.endswith("It fits. Nothing was started.")
    assert max(len(line) for line in answered.stdout.splitlines()) <= 80
    assert sorted(workplace.rglob("*")) == left


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--set", "max_prompt_tokens=4000"), "is more than the 2,048 tokens that starter reads"),
        (("--set", "packed_sequence_length=512"), "packed_sequence_length is 512"),
        (("--engine", "trl", "--set", "trl.micro_batch=5"), "no multiple of trl.micro_batch = 5"),
        (("--set", "stories=missing.parquet"), "missing.parquet"),
        (("--set", "rollout_concurrency=9000000"), "Training: about"),
        (("--run-name", "a run"), "A run name is a folder's name"),
    ],
)
def test_a_dry_run_gives_every_reason_against_it(workplace: Path, arguments: tuple[str, ...], reason: str) -> None:
    answered = hn_titles("train", "--dry-run", *SMALL, *arguments)
    assert answered.returncode == 2, answered.stdout
    assert reason in " ".join(answered.stdout.split()) and "It would not run here:" in answered.stdout
    assert list(workplace.iterdir()) == []
