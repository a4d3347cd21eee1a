"""Figures, pairing, failures and the shape of summary.json."""

from __future__ import annotations

import json

import pytest

from tasks.titles.config import load_profile
from tasks.titles.errors import TooManyFailures
from tasks.titles.evaluation import MEASURES, EvaluatedTitle, check_evaluation, figures, reward_gain, story_means
from tasks.titles.ruler import Ruler
from tasks.titles.summary import (
    Evaluation,
    TrainingFacts,
    evaluate_figures,
    gain_sentence,
    markdown,
    metrics,
    sample_rows,
    table_rows,
)

PROFILE = load_profile("starter", ["bootstrap_samples=200"])
QUALITY = {"rmse": 0.8, "rmse_baseline": 1.1, "pearson": 0.7, "spearman": 0.6}
RULER = Ruler(stories="s", reward_model="r", validator="v", sampling="t")
FACTS = TrainingFacts(
    engine="art", steps=20, best_step=10, seconds=100.0, trajectories_dropped=3, collapsed_at=None, mlflow_run_id="abc"
)


def title(
    story: int, writer: str, mode: str, sample: int = 0, reward: float = 1.0, **changes: object
) -> EvaluatedTitle:
    values: dict[str, object] = {
        "title": f"{writer} {story} {sample}",
        "reward": reward,
        "score": abs(reward),
        "heldout_score": 0.5,
        "verdict": reward != 0,
        "length": 10,
    }
    return EvaluatedTitle(str(story), writer, mode, sample, **(values | changes))  # type: ignore[arg-type]


def failed(story: int, writer: str, mode: str = "sampled", sample: int = 0) -> EvaluatedTitle:
    return EvaluatedTitle(str(story), writer, mode, sample, "?", failure="validator: UnreadableVerdict: maybe")  # type: ignore[arg-type]


def all_titles(stories: int = 10, writers: tuple[str, ...] = ("base", "best")) -> list[EvaluatedTitle]:
    titles = []
    for story in range(stories):
        for number, writer in enumerate(writers):
            titles += [title(story, writer, "sampled", sample, 1.0 + number + story % 3) for sample in range(2)]
            titles.append(title(story, writer, "greedy", reward=2.0 + number))
        titles.append(title(story, "human", "human", reward=3.0))
    return titles


def evaluation(titles: list[EvaluatedTitle], **changes: object) -> Evaluation:
    values: dict[str, object] = {"ruler": RULER, "reward_model": QUALITY, "seconds": 20.0} | changes
    return evaluate_figures("mine", PROFILE, FACTS, titles, **values)  # type: ignore[arg-type]


def test_titles_of_one_story_count_as_one_story() -> None:
    titles = [
        title(1, "base", "sampled", 0, 0.0),
        title(1, "base", "sampled", 1, 4.0),
        title(2, "base", "sampled", 0, 3.0),
    ]
    assert story_means(titles, "base", "sampled", "reward") == {"1": 2.0, "2": 3.0}
    found = figures(titles, "base", "sampled", PROFILE)
    assert found.measures["reward"] is not None and found.measures["reward"].mean == 2.5
    assert found.measures["matches"] is not None and found.measures["matches"].mean == 0.75


def test_a_failed_judgement_is_no_zero_and_is_counted() -> None:
    titles = [*all_titles(), failed(0, "best"), failed(99, "best", sample=1)]
    with_failures, without = evaluation(titles), evaluation(all_titles())
    assert with_failures.of("best", "sampled").measures == without.of("best", "sampled").measures
    assert with_failures.of("best", "sampled").failed == 2
    assert with_failures.summary()["failed_judgements"] == 2


def test_the_gain_pairs_stories_that_both_have() -> None:
    titles = [
        title(1, "base", "sampled", reward=1.0),
        title(1, "best", "sampled", reward=3.0),
        title(2, "base", "sampled", reward=100.0),
        failed(2, "best"),
        failed(3, "base"),
        title(3, "best", "sampled", reward=100.0),
    ]
    gain, ratio = reward_gain(titles, PROFILE)
    assert gain.mean == 2.0
    assert ratio is not None and ratio.mean == 3.0
    with pytest.raises(TooManyFailures, match="No test story"):
        reward_gain([failed(1, "base"), title(1, "best", "sampled")], PROFILE)


def test_too_many_failures_stop_the_evaluation_with_the_reason() -> None:
    titles = all_titles()
    assert check_evaluation([*titles, failed(0, "best")], 0.2) == 1
    with pytest.raises(TooManyFailures, match="UnreadableVerdict: maybe"):
        check_evaluation([*titles, *(failed(n, "best") for n in range(30))], 0.2)
    with pytest.raises(TooManyFailures, match="all of one writer's"):
        check_evaluation([*titles, failed(0, "last")], 0.2)


def test_the_summary_has_the_promised_shape() -> None:
    summary = json.loads(json.dumps(evaluation(all_titles()).summary()))
    expected = {
        "engine",
        "profile",
        "steps",
        "seconds",
        "base",
        "best",
        "human",
        "best_step",
        "mlflow_run_id",
        "reward_model",
    }
    assert expected <= summary.keys()
    assert (summary["engine"], summary["profile"], summary["steps"], summary["best_step"]) == ("art", "starter", 20, 10)
    assert summary["seconds"] == 120.0
    for writer in ("base", "best", "human", "last"):
        for measure in MEASURES:
            assert summary[writer][measure].keys() == {"mean", "low", "high"}
    gain = summary["best"]["reward_gain"]
    assert gain["mean"] == pytest.approx(1.0) and gain["low"] == pytest.approx(1.0)
    assert summary["greedy"]["base"]["reward"]["mean"] == 2.0 and summary["greedy"]["best"]["reward"]["mean"] == 3.0
    # The last checkpoint was no writer of its own, so it is the best one.
    assert summary["last"]["reward"] == summary["best"]["reward"]


def test_no_heldout_model_is_null_and_not_zero() -> None:
    titles = [EvaluatedTitle(**{**one.as_row(), "heldout_score": None}) for one in all_titles()]
    found = evaluation(titles, reward_model=None)
    assert found.summary()["base"]["heldout_score"] is None and found.summary()["reward_model"] is None
    assert "test/heldout_score/mean" not in metrics(found, "best")
    assert all(row["held-out"] == "-" for row in table_rows(found))


def test_tables_show_every_writer_and_untrusted_titles_stay_in_their_cell() -> None:
    titles = all_titles(writers=("base", "best", "last"))
    titles[0] = title(0, "base", "sampled")
    titles.append(title(0, "human", "human", 1))
    wild = [
        one if one.mode != "human" else EvaluatedTitle(**{**one.as_row(), "title": "a | b\n<script>[red]x[/red]"})
        for one in titles
    ]
    found = evaluation(wild)
    assert [row["titles of"] for row in table_rows(found)][:4] == [
        "base model",
        "best, step 10",
        "last, step 20",
        "human titles",
    ]
    assert len(sample_rows(found)) == 6
    text = markdown(found, ["a link"])
    lines = [line for line in text.splitlines() if "script" in line]
    assert lines and all(line.count(" | ") == 3 and "<script" not in line and "a \\| b" in line for line in lines)
    assert text.endswith("* a link\n")


def test_the_headline_warns_of_too_few_stories() -> None:
    assert "With 2 test stories the intervals say little" in gain_sentence(evaluation(all_titles(2)))
    assert "say little" not in gain_sentence(evaluation(all_titles(20)))
