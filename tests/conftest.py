"""Fixtures that several kinds of tests share; each is made when the first test asks for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The tests start several processes that compute at the same time. More threads than cores wait for each
# other in busy loops, which makes small models ten times slower. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# wandb, which TRL and ART import, would report errors to its makers.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
# Commands that the tests start bring a Prefect server along, whose database stands in Prefect's home. Each process that
# runs tests has a home of its own, for of two servers that create one database at the same time, one fails. Set before
# anything imports Prefect.
_prefect_home = tempfile.TemporaryDirectory(prefix="hn-titles-prefect-", ignore_cleanup_errors=True)
os.environ["PREFECT_HOME"] = _prefect_home.name


_SHARE_SERVICES = {"test_browser.py", "test_daily_use.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and those that need all services at once to the same one: it starts them once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "all services" if Path(file).name in _SHARE_SERVICES else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def prefect_harness() -> Iterator[None]:
    """A Prefect server and database of the tests' own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def reward_server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A reward server with the starter reward model, in a process of its own."""
    from reward_server.process import RewardServerProcess

    log: Path = tmp_path_factory.mktemp("reward-server") / "reward-server.log"
    with RewardServerProcess("starter", log_path=log, threads=1) as server:
        yield server.url
