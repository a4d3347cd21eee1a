"""Training reward models: real small trainings on starter stories, killed, continued, served and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_training_parts import SPLITS, FinishedTraining, history, reward_run, stories_of, train
from transformers import AutoTokenizer

from reward_server.model_files import find_model
from reward_server.schemas import ScoreRequest
from reward_server.scorer import Scorer
from tasks.reward_training.encoded import TITLE_TOO_LONG, collate, encode_stories
from tasks.reward_training.registry import register_model
from tasks.reward_training.runs import model_folder
from tasks.reward_training.trainer import total_steps
from tasks.starter.paths import BASE_MODEL, REWARD_MODEL
from tasks.starter.world import generate_stories
from tasks.titles.config import RewardTraining
from tasks.titles.errors import ConfigError, DataError, RunStopped
from tasks.titles.story import Story


def scorer_of(name: str, max_length: int = 4096) -> Scorer:
    return Scorer(find_model(name), device="cpu", dtype=torch.float32, max_length=max_length)


def as_request(story: Story) -> ScoreRequest:
    return ScoreRequest(title=story.title, by=story.by, time=story.time, scraped_body=story.scraped_body, url=story.url)


def test_every_step_and_split_is_in_mlflow(reward_training: FinishedTraining) -> None:
    run = reward_training.run
    series, steps = history(run), reward_training.steps
    assert all(sorted(series[name]) == list(range(1, steps + 1)) for name in ("train/loss", "train/learning_rate"))
    assert sorted(series["val/rmse"]) == [3, 6, steps]
    for split, count in SPLITS.items():
        assert series[f"{split}/stories"] == {steps: min(count, 12)}
        assert {f"{split}/{name}" for name in ("rmse_baseline", "pearson", "spearman", "pairwise_accuracy")} <= set(
            series
        )
        assert f"{split}/calibration/decile_02/predicted" in series
    rates = list(series["train/learning_rate"].values())
    assert rates[0] == 0 and rates[1] == max(rates) and rates[-1] < 0.1 * max(rates)  # up, then down


def test_progress_is_told_to_the_end(reward_training: FinishedTraining) -> None:
    for stage, total in (("tokens", sum(SPLITS.values())), ("training", reward_training.steps), ("figures", 6 + 2 + 3)):
        steps = [done for name, done, of in reward_training.told if name == stage and of == total]
        assert steps == sorted(steps) and steps[-1] == total


def test_training_learns(tmp_path: Path) -> None:
    """A few dozen steps on a few stories bring the error on them below that of their mean."""
    run = reward_run(tmp_path, epochs=8, max_steps=30, eval_steps=100, save_steps=100)
    figures = train(run).figures["train"]
    assert figures.rmse < 0.8 * figures.rmse_baseline
    assert figures.pearson is not None and figures.pearson > 0.6


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    run = reward_run(tmp_path, learning_rate=1e30)
    with pytest.raises(RunStopped, match=r"Lower reward_training\.learning_rate"):
        train(run)
    assert not model_folder(run).exists()


def test_the_model_is_safetensors_only_and_moves(reward_training: FinishedTraining, tmp_path: Path) -> None:
    run = reward_training.run
    moved = shutil.copytree(model_folder(run), tmp_path / "elsewhere")
    assert {path.suffix for path in moved.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja"}
    assert find_model(str(moved / "adapter")).base == moved / "base"
    stories = stories_of(run).by_split["test"]
    here, there = (scorer_of(str(folder / "adapter")) for folder in (model_folder(run), moved))
    requests = [as_request(story) for story in stories]
    assert here.score_texts(requests) == there.score_texts(requests)


def test_training_reads_what_the_server_reads() -> None:
    """Cut or not, the tokens are the server's, whose own tests say that the end of the body goes."""
    [short, long, *_] = generate_stories(2)
    long = replace(long, scraped_body=long.scraped_body * 9, title="The <title>title</title> stays")
    scorer = scorer_of(str(REWARD_MODEL), max_length=300)
    encoded = encode_stories(scorer._tokenizer, [short, long], scorer.max_length)
    assert [ids.tolist() for ids in encoded.ids] == scorer.encode([as_request(short), as_request(long)])
    assert encoded.cut == 1 and len(encoded.ids[1]) <= 300
    assert scorer._tokenizer.decode(encoded.ids[1]).endswith("<title>The &lt;title>title&lt;/title> stays</title>")


def test_what_cannot_be_encoded_is_counted() -> None:
    [fine, wordy, broken] = generate_stories(3)
    wordy = replace(wordy, title="word 1 " * 200)
    broken = replace(broken, scraped_body="\udc80")
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    heard: list[int] = []
    encoded = encode_stories(tokenizer, [wordy, fine, broken], 200, heard.append)
    assert encoded.stories == [fine] and heard == [3]
    assert encoded.dropped == {TITLE_TOO_LONG: 1, "tokeniser error": 1}


def test_a_batch_is_padded_right_and_masked() -> None:
    encoded = encode_stories(AutoTokenizer.from_pretrained(BASE_MODEL), generate_stories(3), 4096).by_length()
    lengths = [len(ids) for ids in encoded.ids]
    assert lengths == sorted(lengths, reverse=True)
    batch = collate([encoded[index] for index in range(3)], padding=7)
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    for ids, row, length in zip(encoded.ids, batch["input_ids"], lengths, strict=True):
        assert row[:length].tolist() == ids.tolist() and set(row[length:].tolist()) <= {7}
    assert batch["labels"].tolist() == pytest.approx([encoded[index]["label"] for index in range(3)])


@pytest.mark.parametrize(
    ("stories", "settings", "steps"),
    [
        (18, {}, 2),
        (32, {}, 2),
        (33, {"epochs": 2}, 6),
        (33, {"epochs": 0.5}, 2),
        (100, {"batch_size": 10, "accumulate": 4}, 3),
        (100, {"max_steps": 4}, 4),
        (100, {"max_steps": 40}, 7),
    ],
)
def test_how_many_steps_the_settings_make(stories: int, settings: dict[str, Any], steps: int) -> None:
    assert total_steps(stories, RewardTraining.model_validate(settings)) == steps


def test_accumulated_passes_make_one_step(tmp_path: Path) -> None:
    run = reward_run(tmp_path, accumulate=2, epochs=1, max_steps=None)
    assert train(run).steps == 3
    assert sorted(history(run)["train/loss"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"base_model": "/nowhere"}, ConfigError, "reward_training.base_model: '/nowhere' cannot be loaded"),
        ({"max_length": 64}, DataError, "train stories could be encoded, expected at least 2"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    run = reward_run(tmp_path, **changes)
    if "max_length" in changes:
        path = Path(run.profile.stories)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "title": "word 1 " * 50}) + "\n" for row in rows))
    with pytest.raises(error) as raised:
        train(run)
    assert words in str(raised.value)


# registry


def test_a_registered_model_is_served_by_alias_and_version(
    reward_training: FinishedTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = reward_training.run
    uri = f"sqlite:///{run.path.parent.parent}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_id = run.record().mlflow_run_id
    names = [register_model(model_folder(run), name="round-trip", tracking_uri=uri, run_id=run_id) for _ in range(2)]
    assert names == ["models:/round-trip/1"] * 2  # a run's model once
    expected = find_model(str(model_folder(run) / "adapter"))
    for name in (names[0], "models:/round-trip@newest"):
        found = find_model(name)
        assert found.version() == expected.version() and found.adapter != expected.adapter
        assert found.base == found.adapter.parent / "base"


@pytest.mark.parametrize("name", ["models:/nobody@newest", "models:/nobody/7", "models:/"])
def test_a_model_that_is_not_registered_is_named(
    name: str, reward_training: FinishedTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = reward_training.run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.path.parent.parent}/mlflow.db")
    with pytest.raises(ConfigError, match=r"is no model that MLflow at sqlite.*MLFLOW_TRACKING_URI"):
        find_model(name)
