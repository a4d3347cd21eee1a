"""Dynamic batching: texts that wait are scored together, within a budget of tokens.

Encoding and the model each have a thread of their own, so the event loop stays free to answer. Every waiter gets
its score or an error, also when the model raises and when the server stops; texts whose client is gone are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reward_server.errors import NotReady, QueueFull, ScoringFailed
from reward_server.schemas import ScoreRequest
from reward_server.scorer import Scorer

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiter:
    """One encoded text and the future that its client awaits."""

    tokens: list[int]
    future: asyncio.Future[float]


def choose_batch(lengths: Sequence[int], token_budget: int) -> list[int]:
    """Return the indices of the texts to score next, given all lengths in tokens, oldest first.

    The oldest is always among them, so that none waits for ever; the others are its neighbours in length, so that
    little is padded. Their number times the longest stays within `token_budget`, unless the oldest alone is above it.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    sizes = [lengths[index] for index in order]
    oldest = low = high = order.index(0)
    while True:
        count = high - low + 2
        shorter = low > 0 and count * sizes[high] <= token_budget
        longer = high + 1 < len(sizes) and count * sizes[high + 1] <= token_budget
        if shorter and longer:
            longer = sizes[high + 1] - sizes[oldest] < sizes[oldest] - sizes[low - 1]
        if longer:
            high += 1
        elif shorter:
            low -= 1
        else:
            return order[low : high + 1]


class Batcher:
    """The queue in front of one scorer. `start` it in a running event loop, `stop` it in the same."""

    def __init__(self, scorer: Scorer, *, token_budget: int, queue_size: int) -> None:
        """`token_budget` is in tokens of one batch, padding included; `queue_size` in texts."""
        self.scorer = scorer
        self.dropped = 0
        """Texts that were not scored because their client was gone."""
        self._token_budget = token_budget
        self._queue_size = queue_size
        self._admitted = 0
        self._waiting: list[Waiter] = []
        self._arrived = asyncio.Event()
        self._stopped = False
        self._encoder_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to score."""
        self._worker = asyncio.create_task(self._work(), name="reward-model-batches")

    @property
    def waiting(self) -> int:
        """Texts admitted whose batch has not begun."""
        return self._admitted

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Return the score of each request, in order. All are admitted or none.

        Raises `QueueFull`, `NotReady` (the server stops), `BadInput` (a text cannot be cut to fit) or `ScoringFailed`.
        Cancelling it drops what has not been scored yet.
        """
        if self._stopped:
            raise _stopping()
        if self._admitted + len(requests) > self._queue_size:
            raise QueueFull(
                f"{self._admitted} texts wait and {self._queue_size} may; {len(requests)} more were refused. "
                "Ask again a little later."
            )
        loop = asyncio.get_running_loop()
        self._admitted += len(requests)
        try:
            encoded = await loop.run_in_executor(self._encoder_thread, self.scorer.encode, requests)
        except BaseException:
            self._admitted -= len(requests)
            raise
        if self._stopped:
            self._admitted -= len(requests)
            raise _stopping()
        waiters = [Waiter(tokens, loop.create_future()) for tokens in encoded]
        self._waiting.extend(waiters)
        self._arrived.set()
        try:
            answers = await asyncio.gather(*(waiter.future for waiter in waiters), return_exceptions=True)
        finally:
            self._drop(waiters)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, float)]

    async def probe(self) -> float:
        """Return the score of a tiny text, ahead of the queue. Raises `NotReady` or `ScoringFailed`."""
        if self._stopped:
            raise _stopping()
        try:
            score = await asyncio.get_running_loop().run_in_executor(self._model_thread, self.scorer.probe)
        except Exception as error:
            raise ScoringFailed(f"The reward model failed on a tiny text: {error}") from error
        if not math.isfinite(score):
            raise _no_number(score)
        return score

    async def stop(self) -> None:
        """Answer every waiter with `NotReady` and end. The batch in the model is not waited for."""
        if self._stopped:
            return
        self._stopped = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        left, self._waiting = self._waiting, []
        self._admitted -= len(left)
        for waiter in left:
            _answer(waiter, _stopping())
        self._encoder_thread.shutdown(wait=False)
        self._model_thread.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if not self._waiting:
                self._arrived.clear()
                continue
            chosen = choose_batch([len(waiter.tokens) for waiter in self._waiting], self._token_budget)
            batch = [self._waiting[index] for index in chosen]
            taken = set(chosen)
            self._waiting = [waiter for index, waiter in enumerate(self._waiting) if index not in taken]
            self._admitted -= len(batch)
            try:
                tokens = [waiter.tokens for waiter in batch]
                scores = await loop.run_in_executor(self._model_thread, self.scorer.score_tokens, tokens)
                for waiter, score in zip(batch, scores, strict=True):
                    _answer(waiter, score if math.isfinite(score) else _no_number(score))
            except asyncio.CancelledError:
                for waiter in batch:
                    _answer(waiter, _stopping())
                raise
            except Exception as error:
                logger.exception("The reward model failed on a batch of %d texts", len(batch))
                for waiter in batch:
                    _answer(waiter, ScoringFailed(f"The reward model failed: {type(error).__name__}: {error}"))

    def _drop(self, waiters: Sequence[Waiter]) -> None:
        """Forget those of `waiters` that are still in the queue."""
        gone = {id(waiter) for waiter in waiters if not waiter.future.done() or waiter.future.cancelled()}
        for waiter in waiters:
            waiter.future.cancel()
        if not gone:
            return
        kept = [waiter for waiter in self._waiting if id(waiter) not in gone]
        dropped = len(self._waiting) - len(kept)
        self._waiting = kept
        self._admitted -= dropped
        self.dropped += dropped


def _answer(waiter: Waiter, answer: float | Exception) -> None:
    if waiter.future.done():  # its client is gone
        return
    if isinstance(answer, Exception):
        waiter.future.set_exception(answer)
    else:
        waiter.future.set_result(answer)


def _stopping() -> NotReady:
    return NotReady("The reward server stops.")


def _no_number(score: float) -> ScoringFailed:
    return ScoringFailed(f"The reward model answered {score}, which is no score.")
