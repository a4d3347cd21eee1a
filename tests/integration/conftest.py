"""Fixtures of the tests that talk to a reward server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest


@pytest.fixture
def no_settings_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run where there is no `.env` with settings of a reward server."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client without any retries."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        yield client
