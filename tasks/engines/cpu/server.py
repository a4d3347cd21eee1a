"""An OpenAI-compatible HTTP server over the sampling worker, bound to this machine only."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.engines.cpu.chat import ChatTokenizer, ControlToken
from tasks.engines.cpu.models import ServedModels, UnknownModel
from tasks.engines.cpu.sampler import Completion, Generation
from tasks.engines.cpu.schemas import ChatRequest, CompletionRequest
from tasks.engines.cpu.worker import Answer, Job, Overloaded, SamplingWorker, ShuttingDown
from tasks.titles.errors import ConfigError, ServiceUnavailable

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_BODY_BYTES = 2 * 1024 * 1024
"""A request's JSON at most: many times the longest prompt that fits any context, far below harm."""
START_TIMEOUT_S = 30.0


class ApiError(Exception):
    """A refusal in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "code": code, "param": None}}


def build_app(models: ServedModels, worker: SamplingWorker, chat: ChatTokenizer, *, api_key: str | None) -> FastAPI:
    """Return the app: `/v1/models`, `/v1/chat/completions`, `/v1/completions` and `/health`.

    Where `api_key` is set, all but `/health` ask for it as a bearer token.
    """
    app = FastAPI(title="Sampling on a CPU", docs_url=None, redoc_url=None)
    app.add_middleware(_Gate, api_key=api_key)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'][1:]) or 'body'}: {item['msg']}" for item in error.errors()
        ]
        return _refusal(ApiError(400, "; ".join(lines), "invalid_request_error"))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if worker.alive else JSONResponse({"status": "stopped"}, 503)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "hn-titles"} for name in models.names()]
        return {"object": "list", "data": cards}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _check_model(models, body.model)
        try:
            prompt = chat.prompt_ids([(message.role, message.content) for message in body.messages])
        except ControlToken as error:
            raise ApiError(400, str(error), "invalid_request_error", "control_token") from error
        if body.max_tokens == 0:
            raise ApiError(400, "max_tokens: expected at least 1", "invalid_request_error")
        limit = _completion_limit(body.max_completion_tokens or body.max_tokens, len(prompt), models.context)
        job = Job(body.model, _generations(body, prompt, limit, chat.stop))
        answer = await _ask(worker, job, request)
        choices = [
            {
                "index": index,
                "finish_reason": one.finish_reason,
                "message": {"role": "assistant", "content": chat.text(_without_end(one, chat.stop))},
                "logprobs": {"content": _token_logprobs(one), "refusal": None} if body.logprobs else None,
            }
            for index, one in enumerate(answer.completions)
        ]
        return JSONResponse(
            {
                "id": f"chatcmpl-{secrets.token_hex(8)}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": body.model,
                "choices": choices,
                "usage": _usage(len(prompt), answer.completions),
            }
        )

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(models, body.model)
        prompt = chat.text_ids(body.prompt) if isinstance(body.prompt, str) else tuple(body.prompt)
        if not prompt or max(prompt) >= models.vocabulary:
            raise ApiError(
                400, f"prompt: expected at least one token id below {models.vocabulary}", "invalid_request_error"
            )
        limit = 16 if body.max_tokens is None else body.max_tokens
        if limit == 0 and not body.echo:
            raise ApiError(400, "max_tokens: expected at least 1 where echo is off", "invalid_request_error")
        limit = _completion_limit(limit, len(prompt), models.context)
        # With max_tokens=0 only the prompt is scored; sampling one token more costs next to nothing.
        scored = bool(body.echo) and body.logprobs is not None
        job = Job(body.model, _generations(body, prompt, max(limit, 1), chat.stop), prompt_logprobs=scored)
        answer = await _ask(worker, job, request)
        choices = []
        for index, one in enumerate(answer.completions):
            one = one if limit else Completion()
            tokens = [*(prompt if body.echo else ()), *one.tokens]
            before = [None, *(answer.prompt_logprobs or [])] if body.echo else []
            logprobs = {
                "tokens": [f"token_id:{token}" for token in tokens],
                "token_logprobs": [*before, *one.logprobs],
                "top_logprobs": None,
                "text_offset": None,
            }
            shown = [*(prompt if body.echo else ()), *_without_end(one, chat.stop)]
            choices.append(
                {
                    "index": index,
                    "finish_reason": one.finish_reason,
                    "text": chat.text(shown),
                    "logprobs": logprobs if body.logprobs is not None else None,
                }
            )
        return JSONResponse(
            {
                "id": f"cmpl-{secrets.token_hex(8)}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": body.model,
                "choices": choices,
                "usage": _usage(len(prompt), answer.completions if limit else []),
            }
        )

    return app


def _check_model(models: ServedModels, name: str) -> None:
    try:
        models.check(name)
    except UnknownModel as error:
        raise ApiError(404, str(error), "invalid_request_error", "model_not_found") from error


def _completion_limit(wanted: int | None, prompt_tokens: int, context: int) -> int:
    """Return how many tokens may be sampled; None takes what the context has left."""
    limit = max(context - prompt_tokens, 1) if wanted is None else wanted
    if prompt_tokens + limit > context:
        raise ApiError(
            400,
            f"The model's context is {context} tokens, but {prompt_tokens} of prompt and {limit} of completion were "
            "asked for. Shorten the prompt or max_tokens.",
            "invalid_request_error",
            "context_length_exceeded",
        )
    return limit


def _generations(
    body: ChatRequest | CompletionRequest, prompt: tuple[int, ...], limit: int, stop: frozenset[int]
) -> list[Generation]:
    # numpy takes no negative seeds, OpenAI's interface does.
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    # The choices' seeds follow one another, as vLLM's do.
    return [Generation(prompt, limit, (seed + index,), body.temperature, stop) for index in range(body.n)]


async def _ask(worker: SamplingWorker, job: Job, request: Request) -> Answer:
    """Wait for the worker's answer, but no longer than the client does."""
    gone = asyncio.ensure_future(_until_gone(request))
    answer: asyncio.Future[Answer] | None = None
    try:
        answer = asyncio.wrap_future(worker.submit(job))
        waited: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client has gone.", "client_closed")
        return answer.result()
    except Overloaded as error:
        raise ApiError(429, f"{error} Try again later.", "server_error", "overloaded") from error
    except ShuttingDown as error:
        raise ApiError(503, str(error), "server_error", "shutting_down") from error
    except UnknownModel as error:
        raise ApiError(404, str(error), "invalid_request_error", "model_not_found") from error
    except ApiError:
        raise
    except Exception as error:  # the worker has logged it
        raise ApiError(500, f"Sampling failed: {error}", "server_error") from error
    finally:
        gone.cancel()
        if answer is not None:
            answer.cancel()


async def _until_gone(request: Request) -> None:
    """Return when the client closes its connection; its body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _token_logprobs(completion: Completion) -> list[dict[str, Any]]:
    """Return log-probabilities as vLLM does with `--return-tokens-as-token-ids`, which ART reads exactly."""
    return [
        {"token": f"token_id:{token}", "bytes": None, "logprob": logprob, "top_logprobs": []}
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True)
    ]


def _without_end(completion: Completion, stop: frozenset[int]) -> Sequence[int]:
    tokens = completion.tokens
    return tokens[:-1] if tokens and tokens[-1] in stop else tokens


def _usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
    sampled = sum(len(one.tokens) for one in completions)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": sampled, "total_tokens": prompt_tokens + sampled}


def _refusal(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers)


class _Gate:
    """Refuses a request without the API key, and one whose body is too large, before it is parsed."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._expected and scope["path"] != "/health" and not hmac.compare_digest(given, self._expected):
            refusal = _refusal(ApiError(401, "Expected the API key as a bearer token.", "invalid_request_error"))
            await refusal(scope, receive, send)
            return
        body = bytearray()
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BODY_BYTES:
                text = f"The body is larger than {MOST_BODY_BYTES} bytes."
                await _refusal(ApiError(413, text, "invalid_request_error"))(scope, receive, send)
                return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)


class HttpServer:
    """Runs an app in a thread of its own, so that neither training nor the caller's loop holds it up."""

    def __init__(self, app: FastAPI, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"Port {port} of {HOST} cannot be used: {error.strerror}. Choose another one.") from error
        self.port: int = self._socket.getsockname()[1]
        # Logging is the caller's business; requests are counted elsewhere.
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="sampling-http", daemon=True)

    def _serve(self) -> None:
        # uvicorn's own `run` calls asyncio's with an argument that nest_asyncio, which ART applies, does not know.
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        finally:
            loop.close()

    def start(self) -> None:
        """Return once requests are taken."""
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.close()
                raise ServiceUnavailable(f"The sampling server did not start on {HOST}:{self.port}; see the log.")
            time.sleep(0.005)

    def close(self) -> None:
        """Stop, and free the port."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
