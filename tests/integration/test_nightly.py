"""A night in Prefect's own harness: a few stories, one step, an evaluation and a decision, all of it real."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.states import State

from flows.nightly import train_and_promote
from tasks.starter.world import generate_stories
from tasks.titles.config import default_tracking_uri
from tasks.titles.run_directory import find_run

pytestmark = [pytest.mark.usefixtures("prefect_harness"), pytest.mark.slow]

SMALL = [
    "stories=stories.jsonl",
    "minimum_score=0",
    "eval_steps=1",
    "groups_per_step=2",
    "val_stories=2",
    "test_stories=3",
    "max_completion_tokens=24",
    "bootstrap_samples=200",
    "heldout_reward_model=null",
]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, reward_server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a small file of stories, with a reward server that is there already."""
    rows = [json.dumps(asdict(story), default=lambda value: value.isoformat()) for story in generate_stories(200)]
    (tmp_path / "stories.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWARD_MODEL_URL", reward_server_url)
    for name in ("MLFLOW_TRACKING_URI", "HELDOUT_REWARD_MODEL_URL", "RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)


async def night() -> tuple[str, list[str], str]:
    """Run a night and return its run's name, the flow runs that it was made of, and what it decided."""
    state: State[str] = await train_and_promote(max_steps=1, group_size=4, overrides=SMALL, return_state=True)
    name = await state.aresult()
    flow_run_id = state.state_details.flow_run_id
    assert isinstance(flow_run_id, UUID)
    async with get_client() as client:
        of_this = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
        parts = sorted(
            await client.read_flow_runs(flow_run_filter=of_this), key=lambda run: run.start_time or run.created
        )
        found = await client.read_artifacts(limit=50, flow_run_filter=of_this)
    (decision,) = [str(artifact.data) for artifact in found if artifact.key == "promotion"]
    return name, [run.name for run in parts], decision


def champion() -> str | None:
    """Return the number of the champion, None where there is none."""
    found = MlflowClient(default_tracking_uri(Path("runs"))).get_registered_model("hn-titles-policy")
    number = found.aliases.get("champion")
    return None if number is None else str(number)


async def test_a_night_trains_evaluates_and_decides_and_the_same_day_goes_on_with_it() -> None:
    name, parts, decision = await night()
    assert parts == ["prepare-data-starter", f"train-{name}", f"evaluate-{name}", f"promote-{name}"]
    run = find_run(Path("runs"), run_name=name)
    assert run.record().state == "evaluated"
    assert (run.profile.max_steps, run.profile.group_size, run.profile.test_stories) == (1, 4, 3)
    promoted = champion()
    assert promoted == ("1" if "is the new champion" in decision else None)
    steps = (run.path / "metrics.jsonl").read_text(encoding="utf-8")

    again, parts, decision = await night()
    assert again == name and len(parts) == 4
    assert (run.path / "metrics.jsonl").read_text(encoding="utf-8") == steps, "no step is made twice"
    assert champion() == promoted and ("is the champion already" in decision) == (promoted is not None)
