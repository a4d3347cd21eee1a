"""Promotion in Prefect's own harness: a real run, evaluated, registered, and set against the champion."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from flows.promote import promote_run
from flows.run import run_titles
from tasks.engines.policy_registry import PolicyRegistry
from tasks.starter.world import generate_stories
from tasks.titles.config import default_tracking_uri
from tasks.titles.errors import ConfigError
from tasks.titles.promotion import Decision, Version, decide, read_candidate
from tasks.titles.run_directory import find_run

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]

SMALL = (
    "stories=stories.jsonl",
    "minimum_score=0",
    "max_steps=2",
    "eval_steps=1",
    "prefect_rollouts=false",
    "groups_per_step=2",
    "group_size=4",
    "val_stories=2",
    "test_stories=4",
    "max_completion_tokens=24",
    "bootstrap_samples=200",
    "heldout_reward_model=null",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None, reward_server_url: str) -> Path:
    """A folder with one evaluated run, which keeps the checkpoints of steps 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("workplace")
    rows = [json.dumps(asdict(story), default=lambda value: value.isoformat()) for story in generate_stories(200)]
    (folder / "stories.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        inside_of(folder, reward_server_url, patch)
        asyncio.run(run_titles("starter", list(SMALL), "mine"))
    return folder


def inside_of(folder: Path, reward_server_url: str, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "HELDOUT_REWARD_MODEL_URL", "RUNS_DIR"):
        patch.delenv(name, raising=False)
    patch.setenv("REWARD_MODEL_URL", reward_server_url)


@pytest.fixture(autouse=True)
def inside(workplace: Path, reward_server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside_of(workplace, reward_server_url, monkeypatch)


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


def registered(name: str, place: int = 0, **changes: object) -> tuple[PolicyRegistry, Version]:
    """Register a checkpoint of the run that is not its best, with an evaluation that is made up."""
    run = find_run(Path("runs"), run_name="mine")
    policy = read_candidate(run).policy
    step = [step for step in (0, 1, 2) if step != policy.step][place]
    registry = PolicyRegistry(name, default_tracking_uri(Path("runs")))
    run_id = run.record().mlflow_run_id
    assert run_id is not None
    return registry, registry.register(run_id, replace(policy, step=step, **changes))  # type: ignore[arg-type]


def crowned(name: str, **changes: object) -> PolicyRegistry:
    """Make such a checkpoint the first champion of `name`."""
    registry, champion = registered(name, **changes)
    assert registry.crown(champion, instead_of=None, lock_folder=Path("runs/.cache"))
    return registry


def level(height: float) -> dict[str, float]:
    """Return rewards of the run's test stories, all the same."""
    return dict.fromkeys(read_candidate(find_run(Path("runs"), run_name="mine")).policy.rewards, height)


async def test_the_first_candidate_is_set_against_the_base_model() -> None:
    decision = await promote_run("mine")
    found = read_candidate(find_run(Path("runs"), run_name="mine"))
    assert decision.champion is None and decision.opponent == "the base model" and decision.stories == 4
    assert decision.candidate.policy == found.policy
    assert decision.opponent_mean == pytest.approx(sum(found.base.values()) / 4)
    assert champion_number("hn-titles-policy") == ("1" if decision.promoted else None)
    told = await page("promote-mine")
    assert decision.reason in told and "MLflow" in told and str(decision.candidate.policy.step) in told


@pytest.mark.parametrize(("name", "height", "promoted"), [("low", -50.0, True), ("high", 50.0, False)])
async def test_a_champion_of_the_same_stories_is_beaten_by_figures_alone(
    name: str, height: float, promoted: bool
) -> None:
    crowned(name, rewards=level(height))
    decision = await promote_run("mine", overrides=[f"registered_name={name}"])
    assert decision.promoted is promoted and decision.judged_again == ()
    assert decision.opponent_mean == height
    assert champion_number(name) == (decision.candidate.number if promoted else "1")
    client = MlflowClient(default_tracking_uri(Path("runs")))
    assert client.get_model_version(name, decision.candidate.number).description == decision.reason
    again = await promote_run("mine", overrides=[f"registered_name={name}"])
    assert (again.difference is None) is promoted, "a champion is set against itself"
    assert champion_number(name) == ("2" if promoted else "1")


async def test_a_champion_that_came_meanwhile_is_the_one_to_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = crowned("meanwhile", rewards=level(-50.0))
    before = registry.champion()
    _, other = registered("meanwhile", 1, rewards=level(50.0))
    decisions: list[Decision] = []

    def decide_while_another_promotes(*arguments: Any, **options: Any) -> Decision:
        decisions.append(decide(*arguments, **options))
        if len(decisions) == 1:
            assert registry.crown(other, instead_of=before, lock_folder=Path("runs/.cache"))
        return decisions[-1]

    monkeypatch.setattr("flows.promote.decide", decide_while_another_promotes)
    decision = await promote_run("mine", overrides=["registered_name=meanwhile"])
    assert [one.promoted for one in decisions] == [True, False] and decision == decisions[-1]
    assert decision.champion == other and champion_number("meanwhile") == other.number
    assert decision.reason in await page("promote-mine")


async def test_a_champion_of_other_judges_is_judged_again_with_the_candidate() -> None:
    policy = read_candidate(find_run(Path("runs"), run_name="mine")).policy
    registry = crowned(
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
