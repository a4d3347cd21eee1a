"""Fixtures of tests that talk to a reward server, and of those that compute on the CPU service's cores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
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
