"""Fixtures of tests that talk to a reward server, compute on the CPU service's cores or train a reward model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from daily_parts import Cancelled, Office, Resumed, Trained
    from reward_training_parts import FinishedTraining

    from tasks.engines.cpu.cores import Cores


@pytest.fixture
def no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run where there is no `.env` with settings of a reward server."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client without any retries."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def cores() -> Iterator[Cores]:
    """Two threads that compute, whatever the machine has."""
    from tasks.engines.cpu.cores import Cores

    cores = Cores(2)
    yield cores
    cores.close()


@pytest.fixture(scope="session")
def reward_training(tmp_path_factory: pytest.TempPathFactory) -> FinishedTraining:
    """A small training of a reward model from its first to its last step."""
    from reward_training_parts import FinishedTraining, reward_run, train

    told: list[tuple[str, int, int]] = []
    run = reward_run(tmp_path_factory.mktemp("reward-training"))
    trained = train(run, lambda stage, done, total, note="": told.append((stage, done, total)))
    return FinishedTraining(run, trained.steps, told)


@pytest.fixture(scope="session")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """All services of `hn-titles up` and the deployments, in a folder of their own."""
    from daily_parts import open_office

    with open_office(tmp_path_factory.mktemp("office")) as office:
        yield office


@pytest.fixture(scope="session")
def trained(office: Office) -> Trained:
    """A training with ART that went well, and a run that nobody heard of again."""
    from daily_parts import train_and_lose_machine

    return train_and_lose_machine(office)


@pytest.fixture(scope="session")
def cancelled(office: Office, trained: Trained) -> Cancelled:
    """A training with TRL after that, cancelled halfway."""
    from daily_parts import cancel_in_training

    return cancel_in_training(office)


@pytest.fixture(scope="session")
def resumed(office: Office, cancelled: Cancelled) -> Resumed:
    """The same training continued, through the death of its worker to its end."""
    from daily_parts import resume_kill_and_retry

    return resume_kill_and_retry(office, cancelled)
