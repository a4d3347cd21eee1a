"""Titles for a text with the real models: from a file and standard input, by the base model, a run and the champion."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_parts import open_tracker, prompts, request, train_with_trl

from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.resume import adapter_folder
from tasks.titles.promotion import JudgedPolicy
from tasks.titles.ruler import Ruler
from tasks.titles.run_directory import RunDirectory, open_run

pytestmark = pytest.mark.slow

PROMPT = prompts("test", 1)[0]
STORY = PROMPT.story
RULER = Ruler(stories="s", reward_model="r", validator="v", sampling="t")


def suggest(cwd: Path, reward_server_url: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "suggest", *arguments],
        cwd=cwd,
        env={
            **{name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "REWARD_MODEL_URL": reward_server_url,
            "COLUMNS": "160",
        },
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
    )


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_titles(found: dict[str, Any]) -> None:
    titles = found["titles"]
    assert 1 <= len(titles) <= 3 and found["failed"] == 0
    assert len({one["title"] for one in titles}) == len(titles)
    assert [one["reward"] for one in titles] == sorted((one["reward"] for one in titles), reverse=True)
    assert all(one["reward"] == (one["score"] if one["supported"] else 0) for one in titles)


def test_a_file_gets_titles_of_the_base_model_where_there_is_no_champion(
    tmp_path: Path, reward_server_url: str
) -> None:
    (tmp_path / "story.txt").write_text(STORY.scraped_body, encoding="utf-8")
    done = suggest(
        tmp_path, reward_server_url, "story.txt", "--count", "3", "--set", f"max_prompt_tokens={PROMPT.tokens - 30}"
    )
    assert done.returncode == 0, done.stderr
    assert "hn-titles-policy has no champion yet" in done.stderr
    assert "Titles for story.txt by the base model" in done.stdout and "supported" in done.stdout
    assert "The text was cut to its first" in done.stdout
    # Asking leaves neither a run nor a database.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".cache"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, reward_server_url: str) -> tuple[Path, RunDirectory]:
    """A trained run whose last checkpoint is the champion."""
    folder = tmp_path_factory.mktemp("workplace")
    asked = request(folder / "runs" / "mine", reward_server_url, engine="trl", max_steps=1, eval_steps=1)
    run = open_run(asked.profile, runs_dir=folder / "runs", run_name="mine")
    asyncio.run(train_with_trl(asked))
    tracker = open_tracker(asked)
    policy = JudgedPolicy("mine", 1, asked.profile, RULER, {"1": 1.0})
    tracker.log_checkpoint(1, adapter_folder(run.path, "trl", 1), {})
    registry = PolicyRegistry(asked.profile.registered_name, tracker.tracking_uri)
    registry.crown(registry.register(tracker.run_id, policy), "for the tests")
    (run.path / "mlflow.db").rename(folder / "runs" / "mlflow.db")
    return folder, run


def test_standard_input_gets_titles_of_the_champion(
    workplace: tuple[Path, RunDirectory], reward_server_url: str
) -> None:
    found = answer(suggest(workplace[0], reward_server_url, "-", "--json", "--count", "3", stdin=STORY.scraped_body))
    assert (found["source"], found["writer"]) == ("standard input", "the champion (mine, step 1)")
    assert found["version"] == "models:/hn-titles-policy/1"
    assert found["read"] == found["characters"] == len(STORY.scraped_body.strip())
    check_titles(found)


@pytest.mark.parametrize(
    ("step", "writer"), [((), "best checkpoint of mine"), (("--step", "0"), "checkpoint of mine, step 0")]
)
def test_any_checkpoint_writes_titles(
    workplace: tuple[Path, RunDirectory], reward_server_url: str, step: tuple[str, ...], writer: str, tmp_path: Path
) -> None:
    path = tmp_path / "story.html"
    path.write_text(f"<body><nav>Menu</nav><p>{STORY.scraped_body}</p></body>", encoding="utf-8")
    found = answer(
        suggest(workplace[0], reward_server_url, str(path), "--json", "--count", "3", "--run-name", "mine", *step)
    )
    assert found["writer"].startswith(writer) and found["version"] is None
    check_titles(found)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("-", "--run-name", "mine", "--step", "9"), 5, "holds no checkpoint of step 9. There are those of steps 0, 1"),
        (("-", "--run-name", "none"), 2, "There is no run 'none'"),
        (("-", "--step", "1"), 2, "--step 1 needs --run-name"),
        (("missing.txt",), 2, "missing.txt cannot be read"),
        (("http://127.0.0.1:1/",), 2, "no public address"),
    ],
)
def test_a_users_mistake_is_told(
    workplace: tuple[Path, RunDirectory], reward_server_url: str, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = suggest(workplace[0], reward_server_url, *arguments, stdin="A text.")
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr and "Traceback" not in done.stderr
