"""The benchmark of reward models: which rows it takes, what it says of them, and its figures within sources."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.references import source_means, word_ridge
from bench.reward_model import command_line, main, settings_of
from bench.settled_stories import last_training_day, read_settled, within_sources
from bench.timed_training import cost_of
from tasks.starter.reward_labels import label
from tasks.starter.world import generate_stories
from tasks.titles.config import RewardTraining
from tasks.titles.story import Story

pytestmark = pytest.mark.usefixtures("no_settings_around")

STORIES = 60
EARLY = 12
FIRST_DAY = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Starter stories, one a day, of which every fifth was read early; all of one source but for every third."""
    rows = [
        {
            **asdict(story),
            "time": int((FIRST_DAY + timedelta(days=day)).timestamp()),
            "split": "val" if day % 4 == 0 else "train",
            "score_kind": "early" if day % 5 == 0 else "final",
            "body_source": "a/blog" if day % 3 == 0 else "the/digest",
        }
        for day, story in enumerate(generate_stories(STORIES))
    ]
    path = tmp_path / "stories.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def bench(parquet: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark for two small steps and return its JSON."""
    out = parquet.with_name("result.json")
    small = ("batch_size=4", "max_steps=2", "report_stories=20")
    settings = [part for setting in small for part in ("--set", setting)]
    assert main([str(parquet), "--max-length", "128", "--out", str(out), *settings, *arguments]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_it_trains_on_settled_stories_by_time_and_by_the_own_column(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench(parquet, "--split", "time", "own")
    by_time, own = result["runs"]
    for run in (by_time, own):
        assert run["early_left_out"] == EARLY
        assert sum(run["stories"].values()) + sum(run["dropped"].values()) == STORIES - EARLY
        assert run["cost"]["steps"] == 2 and run["cost"]["longest_story_tokens"] == 128
        assert run["cost"]["tokens_per_s"] > 0 and run["cost"]["peak_memory_mb"] > 0
    assert set(by_time["stories"]) == {"train", "val", "test"} and set(own["stories"]) == {"train", "val"}
    assert by_time["stories"]["test"] == 4  # of the 48 days that have a settled story
    predictors = [(row["split"], row["predictor"]) for row in own["figures"]]
    assert predictors == [
        ("train", "reward model"),
        ("val", "reward model"),
        ("val", "ridge on words"),
        ("val", "mean of the source"),
    ]
    row = own["figures"][1]
    assert {"rmse", "rmse_baseline", "pearson", "spearman", "pairwise_accuracy", "pearson_within_sources"} <= set(row)
    assert 0 < row["stories_within_sources"] < own["stories"]["val"] == 12  # one of the sources has too few
    shown = capsys.readouterr().out
    assert f"{EARLY} early ones left out" in shown and "published experiment" in shown and "1.13" in shown


def test_epochs_are_not_cut_short_by_the_profile() -> None:
    options = command_line().parse_args(["stories.parquet", "--epochs", "40", "--max-length", "256"])
    settings = settings_of(options, Path("unused"))
    assert (settings.epochs, settings.max_steps, settings.max_length) == (40, None, 256)
    capped = command_line().parse_args(["stories.parquet", "--epochs", "40", "--set", "max_steps=7"])
    assert settings_of(capped, Path("unused")).max_steps == 7


def test_a_mistake_is_told(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(parquet), "--set", "max_steps=1"]) == 2
    assert "two steps at least" in capsys.readouterr().out


def test_without_the_columns_all_rows_count(parquet: Path) -> None:
    pq.write_table(pq.read_table(parquet).drop(["score_kind", "body_source"]), parquet)
    settled = read_settled(parquet)
    assert (len(settled.loaded.stories), settled.early, settled.sources) == (STORIES, 0, {})


def test_the_last_tenth_of_the_days_is_test() -> None:
    [story] = generate_stories(1)
    days = [FIRST_DAY + timedelta(days=day) for day in range(20)]
    stories = [replace(story, time=time) for time in [*days, *[days[-1]] * 100]]
    assert last_training_day([*stories, replace(story, time=None)]) == date(2024, 1, 18)


@pytest.mark.parametrize(
    ("predicted", "labels", "sources", "expected"),
    [
        # The sources' means say the opposite of what is right within them.
        ([0, 1, 2, 3, 4, 10, 11, 12, 13, 14], [5, 6, 7, 8, 9, 0, 1, 2, 3, 4], "aaaaabbbbb", (1.0, 10)),
        # Right in one source; in the other nothing is to be had.
        ([0, 1, 2, 3, 4, 14, 13, 12, 11, 10], [0, 1, 2, 3, 4, 9, 9, 9, 9, 9], "aaaaabbbbb", (0.5**0.5, 10)),
        # Four stories are too few for a mean.
        ([0, 1, 2, 3, 4, 9, -9, 9, -9], [0, 1, 2, 3, 4, 1, 2, 3, 4], "aaaaabbbb", (1.0, 5)),
        ([0, 1, 2, 3], [0, 1, 2, 3], "aaaa", (None, 0)),
        # A constant for each source says nothing within them.
        ([0.1] * 5 + [0.7] * 5, range(10), "aaaaabbbbb", (None, 10)),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [None] * 5, (None, 0)),
    ],
)
def test_within_sources(predicted: Any, labels: Any, sources: Any, expected: tuple[float | None, int]) -> None:
    pearson, stories = within_sources(predicted, labels, list(sources))
    assert (pearson, stories) == (pytest.approx(expected[0]), expected[1])


def test_the_ridge_learns_words() -> None:
    """Scores that a word of the title decides are predicted for other stories."""
    generator = np.random.default_rng(0)
    stories = []
    for number, story in enumerate(generate_stories(200)):
        good = bool(generator.integers(2))
        title = f"{'Zebra' if good else 'Quokka'} {story.title}"
        stories.append(replace(story, id=str(number), title=title, score=400 if good else 2))
    predicted = word_ridge(stories[:150], stories[150:])
    assert np.corrcoef(predicted, [label(story.score) for story in stories[150:]])[0, 1] > 0.5


def test_a_source_without_training_stories_gets_the_mean_of_all() -> None:
    def story(name: str, score: int) -> Story:
        return replace(generate_stories(1)[0], id=name, score=score)

    sources = {"1": "a", "2": "a", "3": "b", "4": "a", "5": "b", "6": "c"}
    train = [story("1", 1), story("2", 100), story("3", 10)]
    others = [story(name, 1) for name in ("4", "5", "6", "7")]
    half, ten = label(100) / 2, label(10)
    assert source_means(train, others, sources) == pytest.approx(
        [half, ten, (2 * half + ten) / 3, (2 * half + ten) / 3]
    )


def test_the_first_step_is_not_timed() -> None:
    settings = RewardTraining.model_validate({"batch_size": 2, "accumulate": 2, "epochs": 2})
    cost = cost_of([0.0, 10.0, 12.0, 15.0, 16.0], settings, [10] * 6 + [20] * 2, cut=3, peak_memory_mb=7.0)
    assert (cost.steps, cost.training_s, cost.step_s, cost.story_tokens) == (4, 16.0, 2.0, 12.5)
    assert cost.tokens_per_s == pytest.approx(3 * 50 / 6)  # three steps of 50 tokens
    assert (cost.longest_story_tokens, cost.bodies_cut, cost.peak_memory_mb) == (20, 3, 7.0)
