"""Who becomes champion: better, worse, not surely better, the first one, and evaluations that cannot be compared."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tasks.titles.config import load_profile
from tasks.titles.errors import ConfigError, DataError, TooManyFailures
from tasks.titles.evaluation import EvaluatedTitle
from tasks.titles.promotion import (
    Decision,
    JudgedPolicy,
    Version,
    check_same_base,
    decide,
    read_candidate,
    read_policy,
)
from tasks.titles.ruler import Ruler, ruler_of
from tasks.titles.run_directory import RunDirectory, open_run, write_json, write_text
from tasks.titles.story import Prompt, Story

PROFILE = load_profile("starter", ["bootstrap_samples=500"])
RULER = Ruler(stories="stories-1", reward_model="reward-1", validator="base-1", sampling="seed-1")
STORIES = [str(number) for number in range(40)]
LEVELS = {story: 2.0 + int(story) % 5 for story in STORIES}


def version(number: int, gain: float = 0.0, noise: float = 0.1, **changes: object) -> Version:
    """A version whose stories earn their level, a gain, and noise that sums up to nothing."""
    rewards = {story: level + gain + (noise if int(story) % 2 else -noise) for story, level in LEVELS.items()}
    policy = JudgedPolicy(f"run-{number}", 10 * number, PROFILE, RULER, rewards)
    return Version("titles", str(number), replace(policy, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gain", "noise", "promoted", "told"),
    [
        (0.5, 0.1, True, "is the new champion: it is surely above models:/titles/1 (run-1, step 10)."),
        (-0.5, 0.1, False, "it is below models:/titles/1 (run-1, step 10), which stays champion."),
        (0.02, 1.0, False, "it is not surely above models:/titles/1 (run-1, step 10), which stays champion."),
        (0.0, 0.0, False, "it is not surely above models:/titles/1 (run-1, step 10), which stays champion."),
    ],
    ids=["better", "worse", "interval touches 0", "equal"],
)
def test_only_a_whole_interval_above_zero_moves_the_champion(
    gain: float, noise: float, promoted: bool, told: str
) -> None:
    champion = version(1, noise=0.0)
    decision = decide(version(2, gain, noise), champion, {})
    assert decision.promoted is promoted
    assert told in decision.reason
    assert decision.difference is not None and decision.difference.mean == pytest.approx(gain)
    assert decision.candidate_mean - decision.opponent_mean == pytest.approx(gain)
    assert decision.stories == 40


@pytest.mark.parametrize(("gain", "promoted"), [(0.5, True), (-0.5, False), (0.0, False)])
def test_the_first_champion_must_be_above_the_base_model(gain: float, promoted: bool) -> None:
    decision = decide(version(1, gain), None, LEVELS)
    assert decision.promoted is promoted and decision.opponent == "the base model"
    told = "is the new champion: it is surely above" if promoted else "the base model, and there is no champion yet."
    assert told in decision.reason


def test_the_champion_itself_is_left_where_it_is() -> None:
    decision = decide(version(3, 0.5), version(3), {})
    assert not decision.promoted and decision.difference is None
    assert "is the champion already" in decision.reason and "Already champion" in decision.markdown()


@pytest.mark.parametrize("field", ["stories", "reward_model", "validator", "sampling"])
def test_what_was_measured_otherwise_is_not_compared(field: str) -> None:
    other = version(1, ruler=replace(RULER, **{field: "other"}))
    with pytest.raises(ConfigError, match=f"with other {field.replace('_', ' ')}"):
        decide(version(2, 0.5), other, {})


def test_stories_without_a_judgement_are_left_out_of_both() -> None:
    whole, holes = version(2, 0.5), version(1)
    fewer = {story: reward for story, reward in holes.policy.rewards.items() if int(story) >= 15}
    decision = decide(whole, replace(holes, policy=replace(holes.policy, rewards=fewer)), {})
    assert decision.stories == 25
    assert decision.difference is not None and decision.difference.mean == pytest.approx(0.5)
    with pytest.raises(TooManyFailures, match="No test story has"):
        decide(whole, None, {"another": 1.0})


def test_few_stories_are_told(gain: float = 0.5) -> None:
    few = version(1, gain)
    decision = decide(few, None, {story: LEVELS[story] for story in STORIES[:4]})
    assert "With 4 test stories the interval says little" in decision.reason


@pytest.mark.parametrize(
    ("decision", "head"),
    [
        (
            decide(version(2, 0.5), version(1), {}, judged_again=["reward model", "stories"]),
            "# Promoted: run-2, step 20",
        ),
        (decide(version(2, -0.5), version(1), {}), "# Not promoted: run-2, step 20"),
    ],
)
def test_the_page_holds_the_figures(decision: Decision, head: str) -> None:
    page = decision.markdown(["MLflow: here"])
    assert page.startswith(head) and decision.reason in page and "* MLflow: here" in page
    assert f"| {decision.candidate_mean:.3f} | {decision.opponent_mean:.3f} |" in page
    assert ("differed in reward model, stories" in page) == bool(decision.judged_again)


def test_adapters_of_other_base_models_share_no_name() -> None:
    other = replace(version(1).policy, profile=PROFILE.model_copy(update={"base_model": "Qwen/Qwen2.5-0.5B-Instruct"}))
    with pytest.raises(ConfigError, match="registered_name"):
        check_same_base(version(2).policy, other)
    check_same_base(version(2).policy, version(1).policy)


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    policy = version(2).policy
    write_json(tmp_path / "evaluation.json", policy.as_dict())
    assert read_policy(tmp_path / "evaluation.json") == policy
    write_json(tmp_path / "evaluation.json", {"run": "x"})
    with pytest.raises(DataError, match="cannot be read"):
        read_policy(tmp_path / "evaluation.json")


# --- what an evaluation left in the run's folder -------------------------------------------------


@pytest.fixture
def evaluated(tmp_path: Path) -> RunDirectory:
    run = open_run(PROFILE, runs_dir=tmp_path, run_name="mine")
    titles = [
        EvaluatedTitle(story, writer, "sampled", sample, "a title", reward=reward + sample)
        for story in ("1", "2")
        for writer, reward in (("base", 1.0), ("best", 2.0))
        for sample in range(2)
    ]
    write_text(run.path / "titles.jsonl", "".join(json.dumps(asdict(title)) + "\n" for title in titles))
    write_json(run.summary_path, {"judged_with": RULER.as_dict(), "best_step": 7, "test_stories": 2})
    run.update(state="evaluated")
    return run


def test_the_candidate_is_the_best_checkpoint_of_the_evaluation(evaluated: RunDirectory) -> None:
    found = read_candidate(evaluated)
    assert (found.policy.name, found.policy.ruler) == ("mine, step 7", RULER)
    assert found.policy.rewards == {"1": 2.5, "2": 2.5} and found.base == {"1": 1.5, "2": 1.5}


@pytest.mark.parametrize(
    ("summary", "state", "told"),
    [
        ({}, "trained", "is not evaluated since it was trained"),
        ({}, "evaluated", "cannot be read"),
        ({"judged_with": RULER.as_dict(), "best_step": 7, "test_stories": 3}, "evaluated", "different evaluations"),
        ({"judged_with": {"stories": "s"}, "best_step": 7, "test_stories": 2}, "evaluated", "cannot be read"),
    ],
)
def test_what_is_not_evaluated_is_no_candidate(
    evaluated: RunDirectory, summary: dict[str, object], state: str, told: str
) -> None:
    write_json(evaluated.summary_path, summary)
    evaluated.update(state=state)
    with pytest.raises(DataError, match=f"{told}.*hn-titles evaluate --run-name mine"):
        read_candidate(evaluated)


# --- what evaluations are measured with -----------------------------------------------------------


def prompt(story_id: str = "1", body: str = "A body.") -> Prompt:
    story = Story(story_id, "someone", None, "A title", "", 5, body, "test")
    return Prompt(story, ({"role": "user", "content": body},), 3)


@pytest.mark.parametrize(
    ("overrides", "prompts", "reward_model", "different"),
    [
        ([], [prompt()], "v1", []),
        (["bootstrap_samples=300", "max_steps=5", "learning_rate.art=1e-4"], [prompt()], "v1", []),
        ([], [prompt(body="Another body.")], "v1", ["stories"]),
        ([], [prompt(), prompt("2")], "v1", ["stories"]),
        ([], [prompt()], "v2", ["reward model"]),
        (["base_model=Qwen/Qwen2.5-0.5B-Instruct"], [prompt()], "v1", ["validator"]),
        (["max_completion_tokens=30"], [prompt()], "v1", ["sampling"]),
        (["seed=2"], [prompt()], "v1", ["sampling"]),
    ],
)
def test_a_ruler_differs_by_what_changes_rewards(
    overrides: list[str], prompts: list[Prompt], reward_model: str, different: list[str]
) -> None:
    first = ruler_of(load_profile("starter"), [prompt()], "v1")
    second = ruler_of(load_profile("starter", overrides), prompts, reward_model)
    assert first.differences(second) == different
    assert Ruler.from_dict(json.loads(json.dumps(second.as_dict()))) == second
