"""What is decided before the application sees a request: its key and its size."""

from __future__ import annotations

import secrets

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.errors import RewardServerError, TooLarge, Unauthorized
from reward_server.metrics import Metrics

OPEN_PATHS = frozenset({"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
"""The description of the interface needs no key."""


def error_response(error: RewardServerError, metrics: Metrics) -> JSONResponse:
    """Return the answer that `error` stands for, and count it."""
    metrics.errors.labels(error.word).inc()
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.word, "message": str(error)}, status_code=error.status, headers=headers)


class Gate:
    """ASGI middleware: checks the bearer key, then reads the body and stops reading at the limit."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_request_bytes: int, metrics: Metrics) -> None:
        """Wrap `app`; without `api_key` everyone may enter."""
        self._app = app
        self._key = api_key.encode() if api_key is not None else None
        self._limit = max_request_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            if self._key is not None and scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            body = await self._read(headers.get(b"content-length", b""), receive)
        except RewardServerError as error:
            await error_response(error, self._metrics)(scope, receive, send)
            return
        if body is None:  # the client left while it was still sending
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self._key or b""):
            raise Unauthorized("This server wants its key: send the header 'Authorization: Bearer <key>'.")

    async def _read(self, content_length: bytes, receive: Receive) -> bytes | None:
        # The announced length only spares the reading; what really comes is counted.
        if content_length.isdigit() and int(content_length) > self._limit:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._limit:
                raise self._too_large()
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The request is larger than the {self._limit} bytes that this server reads. Send fewer texts.")
