"""One chat completion request through the OpenAI client, with this project's errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import httpx
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    InternalServerError,
    RateLimitError,
)
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from tasks.titles.errors import ServiceError, ServiceRejected, ServiceUnavailable

# A policy on a slow machine answers a whole step's requests in one go, the last after minutes; a
# connection on the other hand comes about at once or not at all.
ANSWER_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 10.0
RETRIES = 3


def open_client(base_url: str, api_key: str, *, concurrency: int, retries: int = RETRIES) -> AsyncOpenAI:
    """Return a client which retries what is transient: connections, time-outs, 408, 409, 429 and 5xx.

    `concurrency` is the number of requests that may be under way at once.
    """
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None)
    # trust_env off: a proxy from the environment has no business between two processes of one run.
    http_client = DefaultAsyncHttpxClient(timeout=timeout, limits=limits, trust_env=False)
    return AsyncOpenAI(
        base_url=base_url, api_key=api_key, max_retries=retries, timeout=timeout, http_client=http_client
    )


async def ask(
    client: AsyncOpenAI, service: str, *, model: str, messages: Iterable[Mapping[str, str]], **options: Any
) -> list[Choice]:
    """Return the choices of one chat completion, one at least.

    `service` (policy or validator) is what a failure is counted under; `options` go to the server as
    they are. Raises `ServiceUnavailable` when it is down, slow or overloaded after all retries and
    `ServiceRejected` for a request it refuses or an answer that is no chat completion.
    """
    try:
        answer = await client.chat.completions.create(
            model=model,
            messages=list(messages),  # type: ignore[arg-type]
            **options,
        )
        return _choices(answer)
    except (APIConnectionError, RateLimitError, InternalServerError) as error:
        failure: ServiceError = ServiceUnavailable(
            f"The {service} at {client.base_url} did not answer after {client.max_retries} retries: {_detail(error)}. "
            "Look at its log; if it is overloaded, lower rollout_concurrency."
        )
        failure.service = service
        raise failure from error
    except (APIError, ValueError) as error:
        failure = ServiceRejected(
            f"The {service} at {client.base_url} did not answer for model '{model}': {_detail(error)}"
        )
        failure.service = service
        raise failure from error


def _choices(answer: Any) -> list[Choice]:
    # The client hands on whatever JSON or text came with a status of 200.
    if (
        not isinstance(answer, ChatCompletion)
        or not answer.choices
        or any(choice.message is None for choice in answer.choices)
    ):
        raise ValueError(f"expected a chat completion with a choice, got {str(answer)[:200]!r}")
    return answer.choices


def _detail(error: Exception) -> str:
    if isinstance(error, APIStatusError):
        return f"status {error.status_code}, {str(error.body or error.message)[:300]}"
    return f"{type(error).__name__}: {str(error)[:300]}"
