"""`python -m reward_server`: serve a reward model until stopped."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import socket
import sys
from collections.abc import Sequence

from reward_server.settings import RewardServerSettings, read_settings
from tasks.titles.child_process import end_with_stdin
from tasks.titles.errors import ConfigError, HnTitlesError, UserError

logger = logging.getLogger("reward_server")

_KEPT_BYTES = 2**30
"""Freed memory that the server keeps for the next forward pass."""
_LARGEST_FROM_HEAP = 32 * 2**20
"""The most that glibc takes for `M_MMAP_THRESHOLD`."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def serve(settings: RewardServerSettings) -> None:
    """Serve until SIGINT or SIGTERM; texts that still wait then are answered with 503.

    Raises `ConfigError` where the address is taken or the model cannot be loaded.
    """
    listener = _listen(settings)
    if settings.stop_with_stdin:
        end_with_stdin()

    # Read when PyTorch's OpenMP is loaded. Threads that never spin while they wait make one forward pass of a small
    # model take 1.8 times as long; threads that spin as long as GNU's do by default starve whatever computes beside
    # them, five times as long where both cores are busy. A run's own server gets OMP_WAIT_POLICY=PASSIVE.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    _keep_freed_memory()
    import uvicorn

    from reward_server.app import create_app
    from reward_server.scorer import silence_transformers
    from reward_server.service import RewardService

    silence_transformers()
    app = create_app(settings)
    service: RewardService = app.state.service

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self._watcher = asyncio.create_task(self._stop_if_not_loaded())

        async def _stop_if_not_loaded(self) -> None:
            await service.wait_loaded()
            self.should_exit = self.should_exit or service.load_error is not None

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn lets running requests end first, which would score the whole queue before it stops.
            self._watcher.cancel()
            await service.stop()
            await super().shutdown(sockets)

    # Idle connections outlive the pause between two steps of a training.
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=10)
    host, port = listener.getsockname()[:2]
    logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    with listener:
        Server(config).run(sockets=[listener])
    if service.load_error is not None:
        raise service.load_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve as the command line says and return the exit code: 0 when stopped, 2 for a user's mistake."""
    settings = None
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        serve(settings)
    except KeyboardInterrupt:
        return 0
    except HnTitlesError as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        sys.stderr.write(f"{kind}{error}\n")
        return error.exit_code
    return 0


def _keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep what a forward pass frees instead of giving it back to the kernel.

    Otherwise the next pass has its pages zeroed again: a million page faults for 48 texts of 1,800 tokens, a seventh of
    the time on two cores. By itself glibc learns this in some processes and not in others.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _listen(settings: RewardServerSettings) -> socket.socket:
    if settings.fd is not None:
        try:
            return socket.socket(fileno=settings.fd)
        except OSError as error:
            raise ConfigError(f"File descriptor {settings.fd} is no socket: {error}") from error
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}. "
            "Choose another --port (0: any free one) or stop the server that holds it."
        ) from error
    # An answer's body must not wait 40 ms until the client has acknowledged its head. asyncio sees to that only where a
    # socket names its protocol, as an inherited one does; connections take it over from the listener.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


if __name__ == "__main__":
    sys.exit(main())
