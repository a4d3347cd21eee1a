"""A reward server as a child process: it ends with the run that needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import httpx

from tasks.titles.child_process import ChildProcess
from tasks.titles.errors import ServiceRejected, ServiceUnavailable

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class RewardServerProcess:
    """Starts `python -m reward_server` on a free port of 127.0.0.1 and stops it, its whole process group.

    Use it as a context manager, plain or async. The server also ends when this process is killed outright.
    """

    def __init__(
        self,
        model: str,
        *,
        log_path: Path,
        device: str = "cpu",
        threads: int | None = None,
        api_key: str | None = None,
        start_timeout_s: float = 300.0,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        """`on_progress` hears the seconds waited so far while the model is loading."""
        self.model = model
        self.log_path = log_path
        self._device = device
        self._threads = threads
        self._api_key = api_key
        self._start_timeout_s = start_timeout_s
        self._on_progress = on_progress
        self._process: ChildProcess | None = None
        self._url: str | None = None

    @property
    def url(self) -> str:
        """The server's address, `http://127.0.0.1:<port>`."""
        if self._url is None:
            raise ServiceUnavailable("The reward server has not been started.")
        return self._url

    @property
    def pid(self) -> int | None:
        """The server's process id, None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        self.start()
        try:
            await asyncio.to_thread(self.wait_ready)
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)

    def start(self) -> None:
        """Start the process and return at once; `wait_ready` waits for the model."""
        if self._process is not None:
            raise RuntimeError("this reward server has been started already")
        command = [sys.executable, "-m", "reward_server", "--model", self.model, "--device", self._device]
        command += ["--stop-with-stdin"]
        environment = {key: value for key, value in os.environ.items() if key != "REWARD_SERVER_API_KEY"}
        # The environment is set even where there is no key: it outranks a key in `.env`.
        environment["REWARD_SERVER_API_KEY"] = self._api_key or ""
        if self._threads is not None:
            command += ["--threads", str(self._threads)]
            environment["OMP_NUM_THREADS"] = str(self._threads)
        # The socket is handed over open, so no other process can take the port in between.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            descriptor = listener.fileno()
            self._url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._process = ChildProcess(
                [*command, "--fd", str(descriptor)],
                log_path=self.log_path,
                environment=environment,
                pass_fds=(descriptor,),
            )
        logger.info("Reward server %s starts as process %d, log in %s", self._url, self._process.pid, self.log_path)

    def wait_ready(self) -> None:
        """Wait until the model answers.

        Raises `ServiceUnavailable` with the end of the log when the process ends before or takes too long, and
        `ServiceRejected` when the model is loaded but does not answer.
        """
        process = self._process
        if process is None:
            raise ServiceUnavailable("The reward server has not been started, or was stopped before it was ready.")
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        with httpx.Client(base_url=self.url, headers=headers, timeout=5.0, trust_env=False) as client:
            while True:
                waited = time.monotonic() - started
                code = process.poll()
                if code is not None:
                    raise ServiceUnavailable(
                        f"The reward server ended with exit code {code} before it was ready.{process.log_end()}"
                    )
                if waited > self._start_timeout_s:
                    raise ServiceUnavailable(
                        f"The reward server was not ready after {self._start_timeout_s:g} s.{process.log_end()}"
                    )
                with contextlib.suppress(httpx.TransportError):
                    response = client.get("/health")
                    if response.status_code == 200:
                        return
                    if response.status_code != 503:
                        raise ServiceRejected(
                            f"The reward server is not healthy: HTTP {response.status_code}: {response.text:.300}"
                        )
                if self._on_progress is not None:
                    self._on_progress(waited)
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the process group and wait for it; harmless where nothing runs."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()
            logger.info("Reward server %s has ended", self._url)
