"""The trainer's request: what is read in another process is what was written, or nothing is."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tasks.engines.contract import TrainingRequest
from tasks.engines.trl_engine.request_file import API_KEY, read_request, write_request
from tasks.titles.config import load_profile
from tasks.titles.errors import DataError
from tasks.titles.prompt_file import write_prompts
from tasks.titles.prompts import policy_messages
from tasks.titles.story import Prompt, Story

KEY = "a-key-that-must-not-be-stored"
ODD = "NUL \0, CR \r\n, \u2028, e\u0301, 👩\u200d💻, \ufeff, \U0010ffff, <|im_end|>, </article>"


def prompt(number: int, **changes: Any) -> Prompt:
    story = Story(
        id=str(number),
        by="",
        time=None,
        title=f"Title {number}",
        url="",
        score=number,
        scraped_body=f"Body {number}",
        split="train",
    )
    story = replace(story, **changes)
    return Prompt(story, policy_messages(story.scraped_body), 10 + number)


def request(run_dir: Path, train: tuple[Prompt, ...], val: tuple[Prompt, ...], key: str | None = KEY) -> Any:
    return TrainingRequest(
        profile=load_profile("qwen-7b", ["learning_rate.trl=1.1e-7", "heldout_reward_model=null", "stories=ünï.jsonl"]),
        run_name="a run",
        run_dir=run_dir,
        base_model="models/模型",
        train=train,
        val=val,
        reward_model_url="http://127.0.0.1:1234",
        reward_model_api_key=key,
    )


TRAIN = (
    prompt(3, time=datetime(2006, 10, 9, 18, 21, 51, tzinfo=UTC)),
    prompt(1, time=datetime(2099, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), score=2**62),
    prompt(2, title=ODD, scraped_body=ODD, url=ODD, by=ODD, score=-5),
    prompt(4, scraped_body="long " * 6000),
)
VAL = (prompt(9, split="val"), prompt(8, split="val"))


@pytest.mark.parametrize(
    ("train", "val"), [(TRAIN, VAL), (TRAIN[:1], ()), ((), VAL), ((), ())], ids=["both", "train", "val", "none"]
)
@pytest.mark.parametrize("key", [KEY, None])
def test_a_request_comes_back_the_same_in_another_process(
    train: tuple[Prompt, ...], val: tuple[Prompt, ...], key: str | None, tmp_path: Path
) -> None:
    # A folder's name is bytes, which need not be text.
    sent = request(Path(os.fsdecode(b"runs/not utf-8: \xff")), train, val, key)
    path = write_request(sent, tmp_path)
    code = (
        "import pickle, sys\nfrom pathlib import Path\n"
        "from tasks.engines.trl_engine.request_file import read_request\n"
        "sys.stdout.buffer.write(pickle.dumps(read_request(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], env={**os.environ, API_KEY: key or ""}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert pickle.loads(done.stdout) == sent
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_api_key_stays_out_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    path = write_request(request(tmp_path, TRAIN, VAL), tmp_path)
    assert KEY.encode() not in path.read_bytes()
    assert read_request(path) == request(tmp_path, TRAIN, VAL, key=None)


def test_many_long_stories_are_read_back(tmp_path: Path) -> None:
    many = tuple(prompt(number, scraped_body=f"{number} and so on. " * 1500) for number in range(300))
    sent = request(tmp_path, many, VAL)
    assert read_request(write_request(sent, tmp_path)).train == many


def test_a_newer_request_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    older = write_request(request(tmp_path, TRAIN, VAL), tmp_path)
    assert write_request(request(tmp_path, TRAIN[:2], VAL), tmp_path) == older
    assert read_request(older).train == TRAIN[:2]


def test_a_failed_write_leaves_the_older_request_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_request(request(tmp_path, TRAIN, VAL), tmp_path)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(DataError, match=r"No space left on device.*Make the folder writable"):
        write_request(request(tmp_path, VAL, VAL), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert read_request(path).train == TRAIN


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "of another version"])
def test_what_is_no_request_is_named(damage: str, tmp_path: Path) -> None:
    path = write_request(request(tmp_path, TRAIN, VAL), tmp_path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        write_prompts(path, TRAIN, "no JSON" if damage == "other" else '{"run": "x"}')
    with pytest.raises(DataError, match=r"request\.parquet"):
        read_request(path)
