"""Titles for a text with the real models: from a file, a page and stdin, by the base model, a run and the champion."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import pytest
from training_parts import open_tracker, prompts, request, train_with_trl

from flows.cli import main
from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.resume import adapter_folder
from tasks.titles.promotion import JudgedPolicy
from tasks.titles.ruler import Ruler
from tasks.titles.run_directory import open_run

pytestmark = pytest.mark.slow

PROMPT = prompts("test", 1)[0]
STORY = PROMPT.story
RULER = Ruler(stories="s", reward_model="r", validator="v", sampling="t")


@dataclass(frozen=True)
class Done:
    """A command that came to its end."""

    code: int
    out: str
    err: str


class Suggest(Protocol):
    """Gives `hn-titles suggest` these arguments and, where there is one, this standard input."""

    def __call__(self, *arguments: str, stdin: str = "") -> Done: ...


@pytest.fixture
def suggest(
    workplace: Path, reward_server_url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Suggest:
    """The command in this process, which has torch and MLflow loaded already."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("REWARD_MODEL_URL", reward_server_url)
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("MLFLOW_TRACKING_URI", "RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["hn-titles", "suggest", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return call


def answer(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def check_titles(found: dict[str, Any]) -> None:
    titles = found["titles"]
    assert 1 <= len(titles) <= 3 and found["failed"] == 0
    assert len({one["title"] for one in titles}) == len(titles)
    assert [one["reward"] for one in titles] == sorted((one["reward"] for one in titles), reverse=True)
    assert all(one["reward"] == (one["score"] if one["supported"] else 0) for one in titles)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, reward_server_url: str) -> Path:
    """A folder with a trained run, whose last checkpoint is the champion, and the text as a file and as a page."""
    folder = tmp_path_factory.mktemp("workplace")
    asked = request(folder / "runs" / "mine", reward_server_url, engine="trl", max_steps=1, eval_steps=1)
    run = open_run(asked.profile, runs_dir=folder / "runs", run_name="mine")
    asyncio.run(train_with_trl(asked))
    tracker = open_tracker(asked)
    policy = JudgedPolicy("mine", 1, asked.profile, RULER, {"1": 1.0})
    tracker.log_checkpoint(1, adapter_folder(run.path, "trl", 1), {})
    registry = PolicyRegistry(asked.profile.registered_name, tracker.tracking_uri)
    assert registry.crown(registry.register(tracker.run_id, policy), instead_of=None, lock_folder=folder)
    (run.path / "mlflow.db").rename(folder / "runs" / "mlflow.db")
    (folder / "story.txt").write_text(STORY.scraped_body, encoding="utf-8")
    page = f"<body><nav>Menu</nav><p>{STORY.scraped_body}</p></body>"
    (folder / "story.html").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def site(workplace: Path) -> Iterator[str]:
    """The address of a web server of the folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(workplace))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_user_gets_titles_of_the_champion_for_standard_input(workplace: Path, reward_server_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "suggest", "-", "--json", "--count", "3"],
        cwd=workplace,
        env={
            **{name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "RUNS_DIR")},
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "REWARD_MODEL_URL": reward_server_url,
        },
        input=STORY.scraped_body,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = answer(Done(done.returncode, done.stdout, done.stderr))
    assert "judges" in done.stderr and "the champion" in done.stderr
    assert (found["source"], found["writer"]) == ("standard input", "the champion (mine, step 1)")
    assert found["version"] == "models:/hn-titles-policy/1"
    assert found["read"] == found["characters"] == len(STORY.scraped_body.strip())
    check_titles(found)


def test_where_there_is_no_champion_the_base_model_writes(
    suggest: Suggest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    done = suggest("story.txt", "--count", "3", "--set", f"max_prompt_tokens={PROMPT.tokens - 30}")
    assert done.code == 0, done.err
    assert "hn-titles-policy has no champion yet" in done.err
    assert "Titles for story.txt by the base model" in done.out and "supported" in done.out
    assert "The text was cut to its first" in done.out
    # Asking leaves neither a run nor a database.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".cache"]


@pytest.mark.parametrize(
    ("step", "writer"), [((), "best checkpoint of mine"), (("--step", "0"), "checkpoint of mine, step 0")]
)
def test_any_checkpoint_writes_titles_for_a_page(
    suggest: Suggest, site: str, step: tuple[str, ...], writer: str
) -> None:
    page = f"{site}/story.html"
    found = answer(suggest(page, "--allow-private", "--json", "--count", "3", "--run-name", "mine", *step))
    assert found["writer"].startswith(writer) and (found["version"], found["source"]) == (None, page)
    # What is read is the page's text without its menu.
    assert found["characters"] == len(" ".join(STORY.scraped_body.split()))
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
def test_a_users_mistake_is_told(suggest: Suggest, arguments: tuple[str, ...], code: int, told: str) -> None:
    done = suggest(*arguments, stdin="A text.")
    assert (done.code, done.out) == (code, "")
    assert told in done.err and "Traceback" not in done.err
