"""Dynamic batching: texts that wait are scored together, within a budget of tokens.

Encoding and the model have threads of their own, so the event loop stays free to answer. Every waiter gets its score or
an error, also when the model raises, the worker fails or the server stops; texts whose client is gone are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reward_server.errors import NotReady, OutOfMemory, QueueFull, RewardServerError, ScoringFailed, WorkerFailed
from reward_server.metrics import Metrics
from reward_server.schemas import ScoreRequest
from reward_server.scorer import OUT_OF_MEMORY, Scorer
from reward_server.shared_encoder import SharedEncoder
from reward_server.waiting import Waiter, WaitingTexts, choose_batch

logger = logging.getLogger(__name__)

_SIBLINGS_S = 0.02
"""Longest wait for other titles of the same body that are being encoded; reading the body again takes longer."""
_BURST_S = 0.005
"""Time in which the requests of one burst arrive."""
_PAUSE_S = 0.002
"""A burst is over where nothing came for so long."""


class Batcher:
    """The queue in front of one scorer. `start` it in a running event loop, `stop` it in the same."""

    def __init__(self, scorer: Scorer, *, token_budget: int, queue_size: int, metrics: Metrics) -> None:
        """`token_budget` is in tokens that the model reads at a time, padding included; `queue_size` in texts."""
        self.scorer = scorer
        self._token_budget = token_budget
        self._queue_size = queue_size
        self._metrics = metrics
        self._encoding: Counter[str] = Counter()
        """Texts that are being encoded, by body."""
        self._waiting = WaitingTexts()
        self._in_hand: list[Waiter] = []
        """The batch that is being scored."""
        self._numbers = 0
        self._changed = asyncio.Event()
        """Set when texts have been encoded, or could not be."""
        self._stopping = asyncio.Event()
        self._bursts = False
        """Whether others followed soon after the last text that met an idle model."""
        self._burst_end = 0.0
        self._encoder = SharedEncoder(scorer.encode)
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None
        metrics.queue.set_function(lambda: self.waiting)

    def start(self) -> None:
        """Begin to score."""
        self._worker = asyncio.create_task(self._work(), name="reward-model-batches")
        self._worker.add_done_callback(self._worker_ended)

    @property
    def waiting(self) -> int:
        """Texts admitted whose batch has not begun."""
        return self._encoding.total() + len(self._waiting)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Return the score of each request, in order. All are admitted or none.

        Raises `QueueFull`, `NotReady` (the server stops), `BadInput` (a text cannot be cut to fit), `OutOfMemory`,
        `WorkerFailed` or `ScoringFailed`. Cancelling it drops what has not been scored yet.
        """
        if self._stopping.is_set():
            raise _stopping()
        if self.waiting + len(requests) > self._queue_size:
            raise QueueFull(
                f"{self.waiting} texts wait and {self._queue_size} may; {len(requests)} more were refused. "
                "Ask again a little later."
            )
        loop = asyncio.get_running_loop()
        encoded = await self._encode(requests)
        if self._stopping.is_set():
            raise _stopping()
        waiters = []
        for request, tokens in zip(requests, encoded, strict=True):
            waiter = Waiter(tokens, loop.create_future(), self._numbers, request.scraped_body)
            self._numbers += 1
            self._waiting.add(waiter)
            waiters.append(waiter)
        # A client that sends one title after the other makes no burst, however soon it sends the next.
        company = bool(self._in_hand) or len(self._waiting) > len(waiters)
        self._bursts = self._bursts or (company and loop.time() < self._burst_end)
        try:
            answers = [await _answer_of(waiter) for waiter in waiters]
        finally:
            self._drop(waiters)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, float)]

    async def probe(self) -> float:
        """Return the score of a tiny text, ahead of the queue. Raises `NotReady`, `OutOfMemory` or `ScoringFailed`."""
        if self._stopping.is_set():
            raise _stopping()
        probing = asyncio.get_running_loop().run_in_executor(self._model_thread, self.scorer.probe)
        stopping = asyncio.ensure_future(self._stopping.wait())
        ends: set[asyncio.Future[Any]] = {probing, stopping}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if not probing.done():
            raise _stopping()
        try:
            score = probing.result()
        except OUT_OF_MEMORY as error:
            raise OutOfMemory(f"The device's memory does not hold a tiny text: {error}") from error
        except Exception as error:
            raise ScoringFailed(f"The reward model failed on a tiny text: {error}") from error
        if not math.isfinite(score):
            raise _no_number(score)
        return score

    async def stop(self) -> None:
        """Answer every waiter with `NotReady` and end. The batch in the model is not waited for."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._refuse_all(_stopping())
        self._encoder.stop()
        self._model_thread.shutdown(wait=False)

    async def _encode(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        bodies = Counter(request.scraped_body for request in requests)
        self._encoding += bodies
        try:
            return await self._encoder.encode(requests)
        except asyncio.CancelledError:
            self._metrics.texts_dropped.inc(len(requests))
            raise
        finally:
            self._encoding -= bodies
            self._changed.set()

    async def _work(self) -> None:
        while True:
            if not self._waiting:
                await self._first_of_a_burst()
            await self._siblings_of_the_oldest()
            if self._waiting:
                self._in_hand = self._next_batch()
                await self._score(self._in_hand)
                self._in_hand = []

    async def _first_of_a_burst(self) -> None:
        """Wait for a text; where it came as the first of several the last time, also for those."""
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        expected, self._bursts = self._bursts, False
        self._burst_end = asyncio.get_running_loop().time() + _BURST_S
        while expected and (left := self._burst_end - asyncio.get_running_loop().time()) > 0:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, _PAUSE_S))
            except TimeoutError:
                if not self._encoding:
                    return

    async def _siblings_of_the_oldest(self) -> None:
        """Wait a moment for texts that would share its body."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _SIBLINGS_S
        while self.scorer.shares_prefixes and self._waiting and loop.time() < end:
            if self._waiting.oldest().body not in self._encoding:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), end - loop.time())
            except TimeoutError:
                return

    def _next_batch(self) -> list[Waiter]:
        """Take the next batch out of the queue."""
        texts = self._waiting.sorted
        runs = self.scorer.divide([waiter.tokens for waiter in texts], [waiter.common for waiter in texts[:-1]])
        oldest = texts.index(self._waiting.oldest())
        batch = choose_batch(runs, [len(waiter.tokens) for waiter in texts], oldest, self._token_budget)
        chosen = [texts[index] for index in batch.members]
        self._waiting.remove(chosen)
        self._metrics.batch_texts.observe(len(chosen))
        self._metrics.tokens_computed.inc(batch.computed)
        self._metrics.tokens_shared.inc(batch.shared)
        return chosen

    async def _score(self, batch: Sequence[Waiter]) -> None:
        """Answer each of `batch`; where the memory does not hold it, each half on its own."""
        start = time.perf_counter()
        tokens = [waiter.tokens for waiter in batch]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(
                self._model_thread, self.scorer.score_tokens, tokens
            )
            for waiter, score in zip(batch, scores, strict=True):
                _answer(waiter, score if math.isfinite(score) else _no_number(score))
            return
        except OUT_OF_MEMORY as error:
            # Kept as a text: the error itself would hold the tensors of the failed pass through the next one.
            problem = f"{type(error).__name__}: {error}"
        except Exception as error:
            logger.exception("The reward model failed on a batch of %d texts", len(batch))
            for waiter in batch:
                _answer(waiter, ScoringFailed(f"The reward model failed: {type(error).__name__}: {error}"))
            return
        finally:
            self._metrics.batch_seconds.observe(time.perf_counter() - start)
        logger.warning(
            "Memory does not hold a batch of %d texts; a lower --token-budget avoids this. %s", len(batch), problem
        )
        if len(batch) == 1:
            _answer(batch[0], OutOfMemory(f"Memory does not hold the {len(tokens[0])} tokens of this text: {problem}"))
            return
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            await self._score([waiter for waiter in half if not waiter.future.done()])

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        """Answer everyone and start again, unless the server stops."""
        if self._stopping.is_set():
            return
        error = None if worker.cancelled() else worker.exception()
        logger.error("The worker that feeds the model failed and starts again", exc_info=error)
        self._refuse_all(WorkerFailed(f"The server failed while this text was waiting: {error!r}. Ask again."))
        self.start()

    def _refuse_all(self, error: RewardServerError) -> None:
        left = [*self._in_hand, *self._waiting.sorted]
        self._in_hand = []
        self._waiting.remove(left)
        for waiter in left:
            _answer(waiter, error)

    def _drop(self, waiters: Sequence[Waiter]) -> None:
        """Forget those of `waiters` that are still in the queue."""
        for waiter in waiters:
            waiter.future.cancel()
        self._metrics.texts_dropped.inc(self._waiting.remove(waiters))


async def _answer_of(waiter: Waiter) -> float | Exception:
    try:
        return await waiter.future
    except Exception as error:
        return error


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
