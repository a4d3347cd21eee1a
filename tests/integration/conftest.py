"""Fixtures of tests that talk to a reward server, compute on the CPU service's cores or train a reward model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
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
