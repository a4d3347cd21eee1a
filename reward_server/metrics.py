"""What the server counts, in the text form of Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

_TIMED_PATHS = frozenset({"/score", "/score/batch"})
_BATCH_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.queue = Gauge("reward_server_queue_texts", "Texts that wait for the model", registry=registry)
        self.batch_texts = Histogram(
            "reward_server_batch_texts", "Texts of one batch", buckets=_BATCH_TEXTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "reward_server_batch_seconds", "Time of the model for one batch", buckets=_SECONDS, registry=registry
        )
        self.tokens_computed = Counter(
            "reward_server_tokens_computed", "Tokens that the model read, padding included", registry=registry
        )
        self.tokens_shared = Counter(
            "reward_server_tokens_shared",
            "Tokens that the model did not need to read because texts of a batch begin alike",
            registry=registry,
        )
        self.texts_dropped = Counter(
            "reward_server_texts_dropped", "Texts not scored because their client was gone", registry=registry
        )
        self.request_seconds = Histogram(
            "reward_server_request_seconds",
            "Time from the head of a request to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.errors = Counter("reward_server_errors", "Requests without a score, by kind", ["kind"], registry=registry)

    def text(self) -> bytes:
        """Return all figures in the text form of Prometheus."""
        return generate_latest(self._registry)


class Timing:
    """ASGI middleware: measures how long requests for scores take, refused ones included."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http" or scope["path"] not in _TIMED_PATHS:
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._metrics.request_seconds.labels(scope["path"]).observe(time.perf_counter() - start)
