"""Encoding for many requests at once: what is asked while the tokenizer works is its next piece of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from reward_server.schemas import ScoreRequest

Encoded = list[list[int]]
Encode = Callable[[Sequence[ScoreRequest]], Encoded]


class SharedEncoder:
    """Runs a tokenizer in a thread of its own, for all that wait for it together.

    A tokenizer spreads the texts of one call over the cores; a call for each request would also hand the interpreter
    from thread to thread each time.
    """

    def __init__(self, encode: Encode) -> None:
        """`encode` returns the token ids of each request, or raises for one that cannot be encoded."""
        self._encode = encode
        self._asked: list[tuple[Sequence[ScoreRequest], asyncio.Future[Encoded]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._working: asyncio.Task[None] | None = None

    async def encode(self, requests: Sequence[ScoreRequest]) -> Encoded:
        """Return the token ids of each of `requests`. Raises what their encoding raises."""
        future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        self._asked.append((requests, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work(), name="reward-model-encoding")
        return await future

    def stop(self) -> None:
        """End the thread once its present call is done; who still waits is not answered."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            results: Sequence[Encoded | Exception]
            try:
                results = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._encode_each, [requests for requests, _ in asked]
                )
            except Exception as error:  # the thread has been stopped
                results = [error] * len(asked)
            for (_, future), result in zip(asked, results, strict=True):
                if future.done():  # its client is gone
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _encode_each(self, groups: Sequence[Sequence[ScoreRequest]]) -> list[Encoded | Exception]:
        try:
            encoded = iter(self._encode([request for group in groups for request in group]))
            return [[next(encoded) for _ in group] for group in groups]
        except Exception as error:
            if len(groups) == 1:
                return [error]
        # One of them cannot be encoded; the others do not suffer for it.
        return [result for group in groups for result in self._encode_each([group])]
