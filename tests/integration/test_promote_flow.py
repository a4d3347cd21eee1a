"""Promotion in Prefect's own harness: a real run, evaluated, registered, and set against the champion."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from flows.promote import promote_run
from flows.run import run_titles
from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.tracker import MlflowTracker
from tasks.starter.world import generate_stories
from tasks.titles.config import default_tracking_uri
from tasks.titles.errors import ConfigError
from tasks.titles.promotion import Decision, Version, read_candidate
from tasks.titles.run_directory import find_run

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]

SMALL = (
    "stories=stories.jsonl",
    "minimum_score=0",
    "max_steps=1",
    "eval_steps=1",
    "groups_per_step=2",
    "group_size=4",
    "val_stories=2",
    "test_stories=4",
    "max_completion_tokens=24",
    "bootstrap_samples=200",
    "heldout_reward_model=null",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None) -> Path:
    """A folder with one evaluated run."""
    folder = tmp_path_factory.mktemp("workplace")
    rows = [json.dumps(asdict(story), default=lambda value: value.isoformat()) for story in generate_stories(200)]
    (folder / "stories.jsonl").write_text("\n".join(rows), encoding="utf-8")
    home = os.getcwd()
    os.chdir(folder)
    try:
        asyncio.run(run_titles("starter", list(SMALL), "mine"))
    finally:
        os.chdir(home)
    return folder


@pytest.fixture(autouse=True)
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for name in ("MLFLOW_TRACKING_URI", "REWARD_MODEL_URL", "HELDOUT_REWARD_MODEL_URL", "RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)


async def page(name: str) -> str:
    """Return the newest promotion artifact of the flow runs of this name."""
    async with get_client() as client:
        of_run = FlowRunFilter(name=FlowRunFilterName(like_=name))
        found = await client.read_artifacts(limit=50, flow_run_filter=of_run)
    newest = max((artifact for artifact in found if artifact.key == "promotion"), key=lambda one: one.created)
    return str(newest.data)


def champion_number(name: str) -> str | None:
    number = MlflowClient(default_tracking_uri(Path("runs"))).get_registered_model(name).aliases.get("champion")
    return None if number is None else str(number)


def crowned(name: str, **changes: object) -> tuple[PolicyRegistry, Version]:
    """Make the run's checkpoint of another step the champion of `name`, with an evaluation that is made up."""
    run = find_run(Path("runs"), run_name="mine")
    uri = default_tracking_uri(Path("runs"))
    tracker = MlflowTracker.open(
        run.profile, run_name="mine", tracking_uri=uri, resume_run_id=run.record().mlflow_run_id
    )
    policy = read_candidate(run).policy
    registry = PolicyRegistry(name, uri)
    champion = registry.register(tracker.run_id, replace(policy, step=1 - policy.step, **changes))  # type: ignore[arg-type]
    registry.crown(champion, "for the tests")
    return registry, champion


async def test_the_first_candidate_is_set_against_the_base_model() -> None:
    decision = await promote_run("mine")
    found = read_candidate(find_run(Path("runs"), run_name="mine"))
    assert decision.champion is None and decision.opponent == "the base model" and decision.stories == 4
    assert decision.candidate.policy == found.policy
    assert decision.opponent_mean == pytest.approx(sum(found.base.values()) / 4)
    assert champion_number("hn-titles-policy") == ("1" if decision.promoted else None)
    told = await page("promote-mine")
    assert decision.reason in told and "MLflow" in told and str(decision.candidate.policy.step) in told


@pytest.mark.parametrize(("name", "level", "promoted"), [("low", -50.0, True), ("high", 50.0, False)])
async def test_a_champion_of_the_same_stories_is_beaten_by_figures_alone(
    name: str, level: float, promoted: bool
) -> None:
    policy = read_candidate(find_run(Path("runs"), run_name="mine")).policy
    crowned(name, rewards=dict.fromkeys(policy.rewards, level))
    decision = await promote_run("mine", overrides=[f"registered_name={name}"])
    assert decision.promoted is promoted and decision.judged_again == ()
    assert decision.opponent_mean == level
    assert champion_number(name) == (decision.candidate.number if promoted else "1")
    again = await promote_run("mine", overrides=[f"registered_name={name}"])
    assert (again.difference is None) is promoted, "a champion is set against itself"
    assert champion_number(name) == ("2" if promoted else "1")


async def test_a_champion_of_other_judges_is_judged_again_with_the_candidate() -> None:
    policy = read_candidate(find_run(Path("runs"), run_name="mine")).policy
    registry, _ = crowned(
        "rematch",
        rewards={"a story that is gone": 99.0},
        ruler=replace(policy.ruler, reward_model="older", stories="others"),
    )
    decision: Decision = await promote_run("mine", overrides=["registered_name=rematch"])
    assert decision.judged_again == ("stories", "reward model")
    assert decision.stories == 4 and decision.opponent_mean < 20
    assert decision.champion is not None and decision.champion.policy.rewards.keys() == policy.rewards.keys()
    # The candidate writes what it wrote in its evaluation: the same seeds, the same judges.
    assert decision.candidate.policy.ruler == policy.ruler
    assert decision.candidate.policy.rewards == pytest.approx(dict(policy.rewards), abs=1e-3)
    stored = registry.champion()
    assert stored is not None and stored.policy.ruler == policy.ruler
    assert "judged again" in await page("promote-mine")
    assert (await promote_run("mine", overrides=["registered_name=rematch"])).judged_again == ()


async def test_a_champion_of_another_base_model_is_refused() -> None:
    policy = read_candidate(find_run(Path("runs"), run_name="mine")).policy
    crowned(
        "other-base",
        profile=policy.profile.model_copy(update={"base_model": "Qwen/Qwen2.5-0.5B-Instruct"}),
        ruler=replace(policy.ruler, validator="another"),
    )
    with pytest.raises(ConfigError, match="adapter of Qwen/Qwen2"):
        await promote_run("mine", overrides=["registered_name=other-base"])
    assert champion_number("other-base") == "1"
