"""A Prefect server for the length of one command, where none is configured.

It uses Prefect's own database (`PREFECT_HOME`), so `prefect server start` shows the same runs afterwards,
and it serves the UI, so a run can be watched while it works. (Prefect's ephemeral server does neither show
the UI nor end when its parent is killed.)
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tasks.titles.child_process import ChildProcess, end_with_stdin
from tasks.titles.errors import ConfigError, ServiceUnavailable

logger = logging.getLogger(__name__)

# The first start creates the database, which takes several seconds on a laptop.
_START_TIMEOUT_S = 120.0
_DRAIN_S = 10.0
_POLL_S = 0.1


class PrefectServer:
    """A child process that ends with this one, however that ends.

    Ctrl-C does not reach it: the run still has its end to report.
    """

    def __init__(self, log_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            descriptor = listener.fileno()
            self._process = ChildProcess(
                [sys.executable, "-m", "flows.prefect_server", str(descriptor)],
                log_path=log_path,
                environment={**os.environ, "PREFECT_UI_API_URL": f"{self.url}/api"},
                pass_fds=(descriptor,),
            )

    def wait_ready(self) -> None:
        """Wait until the API answers; raise `ServiceUnavailable` where it ends before or takes too long."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while True:
                try:
                    if client.get(f"{self.url}/api/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise ServiceUnavailable(
                        "Prefect's server did not start. Start one with 'prefect server start' and set "
                        f"PREFECT_API_URL to its address.{self._process.log_end()}"
                    )
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the process and wait for it."""
        self._process.stop()


@dataclass(frozen=True)
class PrefectApi:
    """Where flows of this process report to."""

    url: str
    own: bool
    """Whether it is a server of our own, gone after the command."""
    wait_ready: Callable[[], None]

    @property
    def ui_url(self) -> str:
        """Where the UI is."""
        return self.url.removesuffix("/").removesuffix("/api")


@contextmanager
def prefect_api(log_path: Path, configured: str | None) -> Iterator[PrefectApi]:
    """Have flows of this process report to a Prefect API.

    It is `configured` or what Prefect's own settings say, and else a server of our own, which starts in the
    background while the caller imports the flows.
    """
    url = configured or _url_from_prefect()
    if url:
        _use(url)
        yield PrefectApi(url, own=False, wait_ready=lambda: None)
        return
    server = PrefectServer(log_path)
    try:
        _use(f"{server.url}/api")
        yield PrefectApi(f"{server.url}/api", own=True, wait_ready=server.wait_ready)
    finally:
        _drain()
        server.stop()


def configured_api(url: str | None) -> None:
    """Have this process talk to the Prefect API at `url`, or at the address of Prefect's own settings.

    Raises `ConfigError` where there is neither.
    """
    url = url or _url_from_prefect()
    if url is None:
        raise ConfigError(
            "There is no Prefect server to talk to. Start one with 'make up' or 'prefect server start', and set "
            "PREFECT_API_URL to its address, such as http://127.0.0.1:4200/api."
        )
    _use(url)


def _url_from_prefect() -> str | None:
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def _use(url: str) -> None:
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = url
    refresh_global_settings_context()


def _drain() -> None:
    """Send logs and events that still wait, so that none is left without a server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        try:
            worker.drain_all(timeout=_DRAIN_S)
        except Exception as error:
            logger.warning("Some of Prefect's logs or events were not sent: %s", error)


def serve(descriptor: int) -> None:
    """Serve Prefect's API and UI on the inherited socket until SIGTERM or the end of standard input."""
    import uvicorn

    end_with_stdin()
    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", timeout_graceful_shutdown=3
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    serve(int(sys.argv[1]))
