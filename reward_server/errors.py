"""Every refusal of the server, each with its HTTP status and its word in the answer's `error`.

RewardServerError
├── BadInput        422  the request, or one of its texts, cannot be scored
├── Unauthorized    401  a key is set and the request carries another or none
├── TooLarge        413  more bytes than the server reads
├── QueueFull       429  ask again after `retry_after_s`
├── NotReady        503  loading, stopping, or the model could not be loaded
├── OutOfMemory     503  the text does not fit into the device's memory, not even alone
├── WorkerFailed    503  what feeds the model failed with this text in hand; it has started again
└── ScoringFailed   500  the model raised or answered something that is no number
"""

from __future__ import annotations

from tasks.titles.errors import HnTitlesError


class RewardServerError(HnTitlesError):
    """Base of the tree above."""

    status = 500
    word = "internal_error"
    retry_after_s: int | None = None
    """Seconds after which asking again makes sense; None where it does not."""


class BadInput(RewardServerError):
    """The request, or one of its texts, cannot be scored as it stands."""

    status = 422
    word = "bad_input"


class Unauthorized(RewardServerError):
    """A key is set and the request carries another one or none."""

    status = 401
    word = "unauthorized"


class TooLarge(RewardServerError):
    """The request holds more bytes than the server reads."""

    status = 413
    word = "too_large"


class QueueFull(RewardServerError):
    """More texts wait than the queue takes."""

    status = 429
    word = "queue_full"
    retry_after_s = 1


class NotReady(RewardServerError):
    """The model is being loaded, could not be loaded, or the server stops."""

    status = 503
    word = "not_ready"
    retry_after_s = 2


class OutOfMemory(RewardServerError):
    """The text does not fit into the device's memory, not even alone; other programs may be using it."""

    status = 503
    word = "out_of_memory"
    retry_after_s = 2


class WorkerFailed(RewardServerError):
    """What feeds the model failed while this text was waiting; it has started again."""

    status = 503
    word = "worker_failed"
    retry_after_s = 1


class ScoringFailed(RewardServerError):
    """The model raised, or its answer is not a finite number."""

    word = "scoring_failed"
