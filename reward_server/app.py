"""The application: four routes in front of a reward model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from reward_server.errors import BadInput, RewardServerError
from reward_server.fast_route import FastRoute
from reward_server.gate import Gate, error_response
from reward_server.metrics import Metrics, Timing
from reward_server.schemas import MAX_BATCH, ErrorAnswer, HealthAnswer, ScoreAnswer, ScoreRequest
from reward_server.scorer import load_scorer
from reward_server.service import LoadScorer, RewardService
from reward_server.settings import RewardServerSettings

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; nobody reads it."""
_METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
_RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}


def create_app(settings: RewardServerSettings, load: LoadScorer = load_scorer) -> FastAPI:
    """Return the application for `settings`; `app.state.service` is its `RewardService`.

    The model is loaded by `load` in the background once the application has started; until then it answers 503.
    """
    service = RewardService(settings, load)
    api_key = settings.api_key.get_secret_value() if settings.api_key else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Reward model",
        description="Predicts the log upvotes of a Hacker News title.",
        version="1",
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if api_key else [],
    )
    app.state.service = service
    app.add_middleware(Gate, api_key=api_key, max_request_bytes=settings.max_request_bytes, metrics=service.metrics)
    app.add_middleware(Timing, metrics=service.metrics)
    _answer_errors_as_json(app, service.metrics)

    scoring = APIRouter(route_class=FastRoute)

    @scoring.post("/score", responses=_errors(api_key, 413, 422, 429, 500, 503))
    async def score(request: Request, body: ScoreRequest) -> ScoreAnswer:
        """Score one title."""
        batcher = service.batcher()
        [value] = await _unless_gone(request, batcher.score([body]))
        return ScoreAnswer(score=value, version=batcher.scorer.version)

    @scoring.post("/score/batch", responses=_errors(api_key, 413, 422, 429, 500, 503))
    async def score_batch(
        request: Request, body: Annotated[list[ScoreRequest], Body(min_length=1, max_length=MAX_BATCH)]
    ) -> list[ScoreAnswer]:
        """Score a list of titles; the answers come in the same order. All are scored or none."""
        batcher = service.batcher()
        values = await _unless_gone(request, batcher.score(body))
        return [ScoreAnswer(score=value, version=batcher.scorer.version) for value in values]

    app.include_router(scoring)

    @app.get("/health", responses=_errors(api_key, 413, 500, 503))
    async def health() -> HealthAnswer:
        """Ask the model for the score of a tiny text."""
        batcher = service.batcher()
        scorer = batcher.scorer
        return HealthAnswer(
            model=scorer.name,
            version=scorer.version,
            device=scorer.device,
            dtype=scorer.dtype,
            max_length=scorer.max_length,
            score=await batcher.probe(),
            waiting=batcher.waiting,
        )

    @app.get("/metrics", response_class=Response, responses=_METRICS | _errors(api_key, 413, 500))
    async def metrics() -> Response:
        """Return queue depth, batch sizes, tokens, latencies and errors in the text form of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class _ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what `work` returns; cancel it and raise `_ClientGone` when the client leaves before."""
    working = asyncio.current_task()
    assert working is not None
    leaving = asyncio.create_task(_cancel_when_gone(request, working))
    try:
        return await work
    except asyncio.CancelledError:
        if leaving.done() and working.uncancel() == 0:
            raise _ClientGone from None
        raise
    finally:
        leaving.cancel()


async def _cancel_when_gone(request: Request, working: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    working.cancel()


def _errors(api_key: str | None, *statuses: int) -> dict[int | str, dict[str, Any]]:
    documented: dict[int | str, dict[str, Any]] = {}
    for status in (401, *statuses) if api_key else statuses:
        documented[status] = {"model": ErrorAnswer}
        if status in (429, 503):
            documented[status]["headers"] = _RETRY_AFTER
    return documented


def _answer_errors_as_json(app: FastAPI, metrics: Metrics) -> None:
    """Give every error the form of `ErrorAnswer`, and count it by its word."""

    @app.exception_handler(RewardServerError)
    async def refused(_: Request, error: RewardServerError) -> Response:
        return error_response(error, metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(BadInput(_explain(error)), metrics)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's word for a body that its JSON parser choked on
            return error_response(BadInput("The request body cannot be read as JSON."), metrics)
        word = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        metrics.errors.labels(word).inc()
        content = {"error": word, "message": str(error.detail)}
        return JSONResponse(content, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(_ClientGone)
    async def gone(request: Request, _: _ClientGone) -> Response:
        logger.info("%s %s: %d, the client left before its answer", request.method, request.url.path, _CLIENT_GONE)
        metrics.errors.labels("client_gone").inc()
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        logger.error("Unexpected error", exc_info=error)
        return error_response(
            RewardServerError(f"Unexpected {type(error).__name__}; the server's log says more."), metrics
        )


def _explain(error: RequestValidationError) -> str:
    """Return where the request is wrong, without the texts it carries."""
    problems = error.errors()
    lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in problems[:5]]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    # A key of the request may hold half a surrogate pair, which no answer can carry.
    return "; ".join(lines).encode("utf-8", "replace").decode()
