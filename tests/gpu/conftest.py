"""What tests on a GPU need around them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def judge_on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a reward server with the starter reward model, on the GPU that the policy trains on."""
    from reward_server.process import RewardServerProcess

    log: Path = tmp_path_factory.mktemp("judge") / "reward-server.log"
    with RewardServerProcess("starter", log_path=log, device="cuda") as server:
        yield server.url
