"""Checkpoints in a real MLflow registry in SQLite: registered once, crowned, read back with what they earned."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.engines.policy_registry import PolicyRegistry
from tasks.engines.tracker import MlflowTracker
from tasks.titles.config import default_tracking_uri, load_profile
from tasks.titles.errors import DataError, ServiceUnavailable
from tasks.titles.promotion import JudgedPolicy, Version
from tasks.titles.ruler import Ruler

PROFILE = load_profile("starter")
RULER = Ruler(stories="s", reward_model="r", validator="v", sampling="t")
FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return default_tracking_uri(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def tracker(uri: str, tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    """A run with the checkpoints of steps 10 and 20."""
    tracker = MlflowTracker.open(PROFILE, run_name="mine", tracking_uri=uri)
    for step in (10, 20):
        folder = tmp_path_factory.mktemp(f"step-{step}")
        for name, content in FILES.items():
            (folder / name).write_bytes(content + str(step).encode())
        tracker.log_checkpoint(step, folder, {"val/reward/mean": step / 10})
    return tracker


def policy(step: int = 10) -> JudgedPolicy:
    return JudgedPolicy("mine", step, PROFILE, RULER, {"1": 2.0, "2": 3.0})


def test_a_champion_is_found_again_with_its_files(uri: str, tracker: MlflowTracker, tmp_path: Path) -> None:
    registry = PolicyRegistry("round-trip", uri)
    assert registry.champion() is None
    first, second = (registry.register(tracker.run_id, policy(step)) for step in (10, 20))
    assert (first.uri, second.uri) == ("models:/round-trip/1", "models:/round-trip/2")
    assert registry.champion() is None
    before = None
    for version in (first, second):
        registry.describe(version, "It is better.")
        assert registry.crown(version, instead_of=before, lock_folder=tmp_path)
        before = version
        # Another process finds it.
        assert PolicyRegistry("round-trip", uri).champion() == version
        with registry.adapter(version) as folder:
            found = {name: (folder / name).read_bytes() for name in FILES}
        assert found == {name: content + str(version.policy.step).encode() for name, content in FILES.items()}
        assert not folder.exists()
    held = MlflowClient(uri).get_model_version("round-trip", "2")
    assert held.description == "It is better." and held.tags["step"] == "20" and held.run_id == tracker.run_id


@pytest.mark.parametrize("there_was_a_champion", [False, True])
def test_of_two_promotions_at_once_one_moves_the_champion(
    there_was_a_champion: bool, uri: str, tracker: MlflowTracker, tmp_path: Path
) -> None:
    registry = PolicyRegistry(f"race-{there_was_a_champion}", uri)
    first, second = (registry.register(tracker.run_id, policy(step)) for step in (10, 20))
    before = first if there_was_a_champion else None
    if before:
        assert registry.crown(before, instead_of=None, lock_folder=tmp_path)
    ready = threading.Barrier(4)

    def promote(version: Version) -> bool:
        own = PolicyRegistry(registry.name, uri)
        own.champion()
        ready.wait(timeout=30)
        return own.crown(version, instead_of=before, lock_folder=tmp_path)

    with ThreadPoolExecutor(4) as pool:
        moved = list(pool.map(promote, [second] * 4))
    assert sorted(moved) == [False, False, False, True]
    assert registry.champion() == second
    assert not registry.crown(first, instead_of=before, lock_folder=tmp_path)
    assert registry.champion() == second


def test_a_checkpoint_is_one_version_with_its_newest_evaluation(
    uri: str, tracker: MlflowTracker, tmp_path: Path
) -> None:
    registry = PolicyRegistry("once", uri)
    registry.crown(registry.register(tracker.run_id, policy()), instead_of=None, lock_folder=tmp_path)
    later = replace(policy(), rewards={"1": 5.0}, ruler=replace(RULER, reward_model="newer"))
    assert registry.register(tracker.run_id, later).number == "1"
    assert registry.champion() == Version("once", "1", later)
    judged_again = Version("once", "1", replace(policy(), rewards={"9": 1.0}))
    registry.store_evaluation(judged_again)
    assert registry.champion() == judged_again
    assert len(MlflowClient(uri).search_model_versions("name = 'once'")) == 1


def test_a_step_that_mlflow_does_not_hold_is_told(uri: str, tracker: MlflowTracker) -> None:
    with pytest.raises(ServiceUnavailable, match="no complete LoggedModel of step 30"):
        PolicyRegistry("missing", uri).register(tracker.run_id, policy(30))
    assert PolicyRegistry("missing", uri).champion() is None


def test_a_version_of_somebody_else_is_told(uri: str, tracker: MlflowTracker, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    client.create_registered_model("strange")
    (tmp_path / "evaluation.json").write_text("{}")
    client.create_model_version("strange", tmp_path.as_uri(), run_id=tracker.run_id)
    client.set_registered_model_alias("strange", "champion", "1")
    with pytest.raises(DataError, match="cannot be read as the evaluation"):
        PolicyRegistry("strange", uri).champion()


def test_without_a_database_there_is_no_champion_and_none_is_made(tmp_path: Path) -> None:
    assert PolicyRegistry("any", default_tracking_uri(tmp_path)).champion() is None
    assert list(tmp_path.iterdir()) == []


def test_an_mlflow_that_is_down_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9 did not say which version"):
        PolicyRegistry("any", "http://127.0.0.1:9").champion()
