"""Collects requests that are waiting, has them sampled as one batch and answers every waiter."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

from tasks.engines.cpu.cores import Cores
from tasks.engines.cpu.models import ServedModels
from tasks.engines.cpu.sampler import Completion, Generation, generate, prompt_logprobs

logger = logging.getLogger(__name__)

QUIET_S = 0.015
"""A batch begins once nothing has come in for this long: a step's requests arrive in one burst, a
millisecond or two apart, and are sampled fastest together."""
LONGEST_WAIT_S = 0.25
"""A steady trickle of requests does not hold a batch back for longer than this."""
MOST_ROWS = 128
"""Completions per batch; bounds the memory of caches and logits."""
MOST_WAITING = 2048
"""Jobs in the queue; more are refused at once instead of being kept for minutes."""


class Overloaded(Exception):
    """The queue is full."""


class ShuttingDown(Exception):
    """The service stops; nothing more is answered."""


@dataclass(frozen=True)
class Answer:
    """What a job came to: completions, and log-probabilities of the prompt where they were asked for."""

    completions: list[Completion]
    prompt_logprobs: list[float] | None


@dataclass(eq=False)
class Job:
    """One request: completions of one prompt by one model."""

    model: str
    generations: Sequence[Generation]
    prompt_logprobs: bool = False
    """Also give log p(token | tokens before it) of every prompt token but the first."""
    future: Future[Answer] = field(default_factory=Future)
    """Cancelling it drops the job, also in the middle of its batch."""


class SamplingWorker:
    """Runs jobs in batches of one model at a time, oldest first.

    Its own thread only collects; the batches run in `compute`, where training runs too.
    """

    def __init__(self, models: ServedModels, compute: Executor, cores: Cores) -> None:
        self._models = models
        self._compute = compute
        self._cores = cores
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._last_arrival = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batching", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still being run."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> Future[Answer]:
        """Queue `job`; its future gets an answer or an exception, whatever happens.

        Raises `Overloaded` when too much is waiting and `ShuttingDown` after `close`.
        """
        with self._changed:
            if self._closed:
                raise ShuttingDown("The service is shutting down.")
            if len(self._waiting) >= MOST_WAITING:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already.")
            self._waiting.append(job)
            self._last_arrival = time.monotonic()
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Stop, also in the middle of a batch; whoever still waits gets `ShuttingDown`."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            _finish(job, ShuttingDown("The service is shutting down."))
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._compute.submit(self._answer, batch).result()
            except ShuttingDown as error:
                for job in batch:
                    _finish(job, error)
            except Exception as error:  # whatever it is, the waiters must hear of it
                logger.exception("a batch of %d requests for %s failed", len(batch), batch[0].model)
                for job in batch:
                    _finish(job, error)

    def _next_batch(self) -> list[Job]:
        """Wait for jobs and return those of the oldest one's model; nothing means closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            begun = time.monotonic()
            while not self._closed:
                now = time.monotonic()
                left = min(self._last_arrival + QUIET_S, begun + LONGEST_WAIT_S) - now
                if left <= 0:
                    break
                self._changed.wait(left)
            if not self._waiting:
                return []
            model = self._waiting[0].model
            chosen: list[Job] = []
            others: list[Job] = []
            rows = 0
            for job in self._waiting:
                fits = not chosen or rows + len(job.generations) <= MOST_ROWS
                if job.model == model and fits:
                    chosen.append(job)
                    rows += len(job.generations)
                else:
                    others.append(job)
            self._waiting = deque(others)
        return chosen

    def _answer(self, batch: list[Job]) -> None:
        jobs = [job for job in batch if not job.future.cancelled()]
        if not jobs:
            return
        decoder = self._models.decoder(jobs[0].model)
        owners = [job for job in jobs for _ in job.generations]
        completions = generate(
            decoder,
            [generation for job in jobs for generation in job.generations],
            self._cores,
            cancelled=lambda index: self._closed or owners[index].future.cancelled(),
        )
        if self._closed:
            raise ShuttingDown("The service is shutting down.")
        rest = iter(completions)
        for job in jobs:
            own = [next(rest) for _ in job.generations]
            scores = prompt_logprobs(decoder, job.generations[0].prompt) if job.prompt_logprobs else None
            _finish(job, Answer(own, scores))


def _finish(job: Job, outcome: Answer | Exception) -> None:
    """Answer a job, unless that was done or its client has gone."""
    if job.future.done() or not job.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Answer):
        job.future.set_result(outcome)
    else:
        job.future.set_exception(outcome)
